"""Tokenizer, data sets and batches.

The tokenizer is tiktoken's byte-pair encoder over the checkpoint's own vocabulary and merges. Text
is data: a string that happens to contain "<|endoftext|>" is encoded as those thirteen characters.
"""

import json
from pathlib import Path

import tiktoken

from model import Config, InputError

# ---------------------------------------------------------------------------------------- tokenizer

# How text is cut into words before any merge: contractions, words, numbers, signs, spaces
# (Radford et al., 2019).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same with every digit on its own, as in SmolLM2.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else from U+0100 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Tokenizer:
    """Text to the checkpoint's ids and back.

    vocab: symbol -> id; merges: pairs of symbols, in order of priority. bos, eos and pad are ids
    from the checkpoint's config (None if it has none); they are never produced from text.
    """

    def __init__(self, vocab: dict[str, int], merges: list, pattern: str, config: Config) -> None:
        self.bos, self.eos, self.pad = config.bos, config.eos, config.pad
        symbols = byte_symbols()
        # tiktoken wants ranks (merge order), which are not the checkpoint's ids in every family.
        order = dict.fromkeys([*symbols, *(a + b for a, b in merges)])
        order = [s for s in order if s in vocab]
        ranks = {bytes(symbols[ch] for ch in s): rank for rank, s in enumerate(order)}
        self.bpe = tiktoken.Encoding(
            "checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.to_id = [vocab[s] for s in order]
        self.to_rank = {i: rank for rank, i in enumerate(self.to_id)}

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json and merges.txt. Raises InputError if neither is there
        or the tokenizer is no byte-level BPE."""
        try:
            if (folder / "tokenizer.json").exists():
                spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
                bpe, pattern = spec["model"], word_pattern(spec["pre_tokenizer"])
                merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
                return cls(bpe["vocab"], merges, pattern, config)
            vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no tokenizer.json and no {Path(error.filename).name}"
            ) from error
        except (KeyError, json.JSONDecodeError) as error:
            raise InputError(f"the tokenizer in {folder} cannot be read: {error!r}") from error
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        pairs = any(len(s) == 2 and s.isdigit() for s in vocab)
        return cls(vocab, merges, GPT2_PATTERN if pairs else DIGITS_PATTERN, config)

    def encode(self, text: str) -> list[int]:
        return [self.to_id[rank] for rank in self.bpe.encode_ordinary(text)]

    def decode(self, ids: list[int]) -> str:
        """Special tokens are left out."""
        ranks = [self.to_rank[i] for i in ids if i in self.to_rank]
        return self.bpe.decode_bytes(ranks).decode("utf-8", errors="replace")


def word_pattern(spec: dict) -> str:
    """The regular expression that a tokenizer.json's pre_tokenizer stands for."""
    steps = spec.get("pretokenizers", [spec])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and not steps[0].get("add_prefix_space"):
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return DIGITS_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return steps[0]["pattern"]["Regex"]  # Llama 3
    raise InputError(f"pre_tokenizer {' + '.join(kinds)} is not a byte-level BPE known here")
