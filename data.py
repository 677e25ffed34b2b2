"""Tokenizer; GLUE, E2E and Alpaca from files or the hub (appendix B, E.3); batches.

The tokenizer is tiktoken's byte-pair encoder over the checkpoint's own vocabulary and merges. Text
is data: a string that happens to contain "<|endoftext|>" is encoded as those thirteen characters.

    python data.py                      two examples of nano/e2e: text, tokens, batch
"""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
from tqdm import tqdm

from model import Batch, Config
from support.files import InputError, locate, parse_json, read_json, read_text, reason

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
    from the checkpoint's config (None if it has none); they are never produced from text. `start`
    holds the ids that the checkpoint puts before a text (Llama 3's <|begin_of_text|>). A byte that
    the vocabulary lacks (some control characters in SmolLM2's) is left out of the text.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list, pattern: str, config: Config, start: list = ()
    ) -> None:
        ids, size = [*vocab.values(), *start], config.vocab_size
        if not all(type(i) is int and 0 <= i < size for i in ids):
            raise ValueError(f"it has ids that are not whole numbers below {size}")
        self.family, self.start = config.family, [*start]
        self.bos, self.eos, self.pad = config.bos, config.eos, config.pad
        symbols = byte_symbols()
        # tiktoken wants ranks (merge order), which are not the checkpoint's ids in every family.
        order = dict.fromkeys([*symbols, *(a + b for a, b in merges)])
        if unknown := order.keys() - vocab.keys() - symbols.keys():
            raise ValueError(f"its vocabulary lacks {min(unknown)!r}, which a merge makes")
        ranks = {bytes(symbols[ch] for ch in s): rank for rank, s in enumerate(order)}
        how = dict(pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bpe = tiktoken.Encoding("checkpoint", **how)
        self.lacks = bytes(b for s, b in symbols.items() if s not in vocab)
        self.words = regex.compile(pattern) if self.lacks else None
        self.to_id = [vocab.get(s) for s in order]
        self.to_rank = {i: rank for rank, i in enumerate(self.to_id) if i is not None}

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json and merges.txt. Raises InputError if neither is there
        or the tokenizer is no byte-level BPE."""
        path = folder / "tokenizer.json"
        try:
            if path.exists():
                spec, start = read_json(path), []
                if spec.get("normalizer"):
                    raise InputError(f"the tokenizer in {folder} has a normalizer: not supported")
                vocab, pattern = spec["model"]["vocab"], word_pattern(spec["pre_tokenizer"])
                merges = spec["model"]["merges"]
                merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
                start = leading_ids(spec.get("post_processor") or {})
            elif not (folder / "vocab.json").exists():
                raise InputError(f"{folder} holds no tokenizer.json and no vocab.json")
            else:
                vocab, start = read_json(folder / "vocab.json"), []
                lines = read_text(folder / "merges.txt").split("\n")
                merges = [m.split(" ") for m in lines if m and not m.startswith("#version")]
                # Only where digits are not on their own can one follow a space (Ġ) or a digit.
                joined = any(re.fullmatch(r"[Ġ\d]\d", s) for s in vocab)
                pattern = GPT2_PATTERN if joined else DIGITS_PATTERN
            return cls(vocab, merges, pattern, config, start)
        except InputError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, regex.error) as error:
            raise InputError(f"the tokenizer in {folder} cannot be read: {error!r}") from error

    def encode(self, text: str) -> list[int]:
        """Half a surrogate pair counts as U+FFFD. Raises InputError if tiktoken cannot take it."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        data = text.encode()
        try:
            if self.lacks and data != data.translate(None, self.lacks):  # before anything merges
                words = (w.encode().translate(None, self.lacks) for w in self.words.findall(text))
                ranks = [r for w in words if w for r in self.bpe._encode_single_piece(w)]
            else:
                ranks = self.bpe.encode_ordinary(text)
        except BaseException as error:  # the class of its Rust's errors has no name to import
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"the tokenizer fails at the text {text[:60]!r}: {error}") from None
        return [self.to_id[rank] for rank in ranks]

    def decode(self, ids: list[int]) -> str:
        """Special tokens are left out."""
        ranks = [self.to_rank[i] for i in ids if i in self.to_rank]
        return self.bpe.decode_bytes(ranks).decode("utf-8", errors="replace")


def word_pattern(spec: dict | None) -> str:
    """The regular expression that a tokenizer.json's pre_tokenizer stands for."""
    steps = (spec or {}).get("pretokenizers", [spec or {}])
    kinds, first, last = [step.get("type") for step in steps], steps[0], steps[-1]
    if not last.get("add_prefix_space"):
        by_gpt2 = last.get("use_regex", True)  # else by the step before
        if kinds == ["ByteLevel"] and by_gpt2:
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and by_gpt2 and first["individual_digits"]:
            return DIGITS_PATTERN
        if kinds == ["Split", "ByteLevel"] and not by_gpt2 and first["behavior"] == "Isolated":
            return first["pattern"]["Regex"]  # Llama 3
    raise InputError(f"pre_tokenizer {' + '.join(map(str, kinds))} is no byte-level BPE known here")


def leading_ids(post_processor: dict) -> list[int]:
    """The special tokens that a tokenizer.json's post_processor puts before a text."""
    ids = []
    for step in post_processor.get("processors", [post_processor]):
        for piece in step.get("single", []) if step.get("type") == "TemplateProcessing" else []:
            if "SpecialToken" not in piece:  # the text begins here
                break
            ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


csv.field_size_limit(2**31 - 1)  # a quotation mark that nothing closes is found out all the same


def read_lines(path: Path) -> list[str]:
    """Its lines, stripped."""
    return [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]


def _from_hub(what: str, data: str, *args: str, **kwargs: str):
    """`datasets.load_dataset`; an InputError says what is not to be had, and what --data takes."""
    from datasets import load_dataset  # slow to import

    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # offline, moved, ...: many kinds, one thing to tell the user
        way = f"get the official files by other means and pass --data {data}"
        raise InputError(f"{what} cannot be fetched ({reason(error)}); {way}") from error


# ---------------------------------------------------------------------------------------------- E2E

E2E_FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
# The copy with which the LoRA paper trained and scored, in its repository's examples/NLG/data/e2e:
# tokenized ("family - friendly"), a prompt and a reference on each line. BLEU and NIST of the
# paper's row belong to this text.
E2E_TOKENIZED = {"train": "train.txt", "dev": "valid.txt", "test": "test.txt"}
E2E_HUB = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
# The names that Li & Liang (2021), and after them the LoRA paper, use in the prompt.
E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def e2e_prompt(mr: str) -> str:
    """A meaning representation as text: "name[Blue Spice], eatType[pub]" becomes
    "name : Blue Spice | Type : pub"; what has that form already, in the tokenized text, stays.
    Raises InputError if it has neither form."""
    if re.fullmatch(r"[^][|:]+ : [^|]*( \| [^][|:]+ : [^|]*)*", mr):
        return mr
    pair = r"\s*[^][,\s][^][,]*\[[^][]*\]\s*"
    if not re.fullmatch(f"{pair}(,{pair})*", mr):
        raise InputError(f"malformed MR {mr!r}; write it as name[Blue Spice], eatType[pub]")
    pairs = [(n.strip(), v.strip()) for n, v in re.findall(r"([^][,]+)\[([^][]*)\]", mr)]
    return " | ".join(f"{E2E_NAMES.get(name, name)} : {value}" for name, value in pairs)


def is_tokenized(folder: str | Path | None) -> bool:
    """Whether `read_e2e` finds the LoRA paper's text in `folder`. Official files go before it."""
    if folder is None or (locate(folder) / E2E_FILES["train"]).exists():
        return False
    return (locate(folder) / E2E_TOKENIZED["train"]).exists()


def e2e_file(folder: str | Path, split: str) -> Path:
    """The file of a split. Raises InputError if it is not there."""
    path = locate(folder) / (E2E_TOKENIZED if is_tokenized(folder) else E2E_FILES)[split]
    if not path.is_file():
        names, other = (", ".join(files.values()) for files in (E2E_FILES, E2E_TOKENIZED))
        raise InputError(f"{path} is missing; --data DIR must hold {names}, or LoRA's {other}")
    return path


def read_e2e(folder: str | Path | None, split: str) -> list[tuple[str, str]]:
    """(MR, reference) pairs of one split ("train", "dev", "test") from the official CSV files in
    `folder`, from the LoRA paper's text files there, or from the challenge's repository if None.
    Raises InputError with file and line."""
    if folder is None:
        url = E2E_HUB + E2E_FILES[split]
        table = _from_hub("the E2E data", "DIR", "csv", data_files=url, split="train")
        return list(zip(table["mr"], table["ref"], strict=True))
    path = e2e_file(folder, split)
    pairs, lines = [], read_lines(path)
    if is_tokenized(folder):
        rows = (dict(zip(("mr", "ref", None), line.split("||"), strict=False)) for line in lines)
    else:
        rows = csv.DictReader(line + "\n" for line in lines)
        if absent := {"mr", "ref"} - set(rows.fieldnames or ()):
            raise InputError(f"{path} has no column {' and no column '.join(sorted(absent))}")
    for number, row in enumerate(rows, start=1):
        try:
            if None in row:
                raise InputError("more values than columns; quote values that hold a comma")
            if not (row.get("ref") or "").strip():
                raise InputError("the reference is empty")
            e2e_prompt(row["mr"] or "")
        except InputError as error:
            number = getattr(rows, "line_num", number)  # a quoted value may go over several
            raise InputError(f"{path}, line {number}: {error}") from None
        pairs.append((row["mr"], row["ref"]))
    if not pairs:
        raise InputError(f"{path} holds no examples")
    return pairs


def group_references(pairs: list[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Pairs as distinct MRs, in order of appearance, and the references of each."""
    groups: dict[str, list[str]] = {}
    for mr, ref in pairs:
        groups.setdefault(mr, []).append(ref)
    return list(groups), list(groups.values())


# --------------------------------------------------------------------------------------------- GLUE

GLUE_HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE (Wang et al., 2018): its official files and the metric of Table 1."""

    folder: str
    texts: tuple[str, ...]  # the columns that hold the sentence or the two
    label: str  # the column that holds the label
    labels: tuple[str, ...] = ()  # in the hub's order; none: a score from 0 to 5
    metric: str = "accuracy"
    dev: tuple[str, ...] = ("dev",)
    header: tuple[str, ...] = ()  # if the files have none
    ragged: bool = False  # the official file has broken rows


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES, QUESTIONS = ("sentence1", "sentence2"), ("question1", "question2")
GLUE = {  # in the order of Table 1
    "mnli": GlueTask("MNLI", SENTENCES, "gold_label", ("entailment", "neutral", "contradiction"),
                     dev=("dev_matched", "dev_mismatched")),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("0", "1")),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1")),
    "cola": GlueTask("CoLA", ("sentence",), "label", ("0", "1"), "matthews",
                     header=("source", "label", "star", "sentence")),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "qqp": GlueTask("QQP", QUESTIONS, "is_duplicate", ("0", "1"), ragged=True),
    "rte": GlueTask("RTE", SENTENCES, "label", ENTAILMENT),
    "stsb": GlueTask("STS-B", SENTENCES, "score", metric="pearson"),
}  # fmt: skip

Row = tuple[tuple[str, ...], float]  # one or two texts; the label's number, or the score


def glue_file(folder: str | Path, task: str, split: str) -> Path:
    """The official file of a split. Raises InputError if it is not there."""
    path = locate(folder) / GLUE[task].folder / f"{split}.tsv"
    if not path.is_file():
        has = [t.folder for t in GLUE.values() if (locate(folder) / t.folder).is_dir()]
        has = ", ".join(has) or "no task of GLUE, whose own folders it must hold, such as RTE"
        raise InputError(f"{path} is missing; --data {folder} has {has}")
    return path


def read_glue(folder: str | Path | None, task: str, split: str) -> list[Row]:
    """The rows of "train", "dev" or, for MNLI, "dev_matched" and "dev_mismatched", from the
    official TSV files in `folder`, or from the hub if None.

    A quotation mark is text, as in the official files, which quote nothing. Raises InputError with
    file and line.
    """
    spec = GLUE[task]
    if folder is None:
        split = split.replace("dev", "validation")
        table = _from_hub(GLUE_HUB, "DIR", GLUE_HUB, task, split=split)
        columns = [name for name in table.column_names if name not in ("label", "idx")]
        texts = zip(*(table[name] for name in columns), strict=True)
        return list(zip(texts, table["label"], strict=True))
    path = glue_file(folder, task, split)
    rows = [line.split("\t") for line in read_text(path).rstrip("\n").split("\n")]
    header = spec.header or tuple(rows.pop(0))
    absent = {*spec.texts, spec.label} - set(header)
    if absent:
        raise InputError(f"{path} has no column {' and no column '.join(sorted(absent))}")
    *texts, label = (header.index(name) for name in (*spec.texts, spec.label))
    examples, broken = [], 0
    for number, row in enumerate(rows, start=1 if spec.header else 2):
        where = f"{path}, line {number}:"
        if len(row) < len(header):
            broken += 1
            if spec.ragged:
                continue
            raise InputError(f"{where} {len(row)} columns, not {len(header)}")
        if spec.labels and row[label] not in spec.labels:
            raise InputError(f"{where} label {row[label]!r} is not one of {', '.join(spec.labels)}")
        if not spec.labels and not re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", row[label]):
            raise InputError(f"{where} score {row[label]!r} is not a number from 0 to 5")
        target = spec.labels.index(row[label]) if spec.labels else float(row[label])
        examples.append((tuple(row[i] for i in texts), target))
    if broken:
        print(f"{path}: left out {broken} rows with too few columns")
    if not examples:
        raise InputError(f"{path} holds no examples")
    return examples


# ------------------------------------------------------------------------------------------- Alpaca

ALPACA_HUB = "tatsu-lab/alpaca"
ALPACA_FIELDS = ("instruction", "input", "output")
# The template of Taori et al. (2023), with which the data were made and every model is tuned.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_INPUT = ", paired with an input that provides further context"
ALPACA_WISH = ". Write a response that appropriately completes the request."


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """What precedes the response; `context` is the data's field "input"."""
    task = ALPACA_TASK + (ALPACA_INPUT if context else "") + ALPACA_WISH
    more = f"\n\n### Input:\n{context}" if context else ""
    return f"{task}\n\n### Instruction:\n{instruction}{more}\n\n### Response:"


def read_alpaca(file: str | Path | None, split: str) -> list[tuple[str, str]]:
    """(prompt, response) of "train" or "dev", from a JSON or JSONL file with the fields
    instruction, input and output, or from the hub if None. There is no official split: dev is the
    first 200 examples, as in Meta's llama-recipes, or a tenth of a smaller file. Raises InputError
    with the number of the example."""
    if file is None:
        rows = _from_hub(ALPACA_HUB, "FILE", ALPACA_HUB, split="train").to_list()
    else:
        text = read_text(locate(file))
        rows = parse_json(text, file, lines=text.lstrip()[0] != "[")  # else it is one list
    pairs = []
    for n, row in enumerate(rows, start=1):
        texts = [row.get(f) or "" for f in ALPACA_FIELDS] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not (texts[0] and texts[2]):
            if file is not None:
                raise InputError(f"{file}, example {n} lacks an instruction or an output text")
            continue  # the hub's data have a few empty outputs
        instruction, context, output = texts
        pairs.append((alpaca_prompt(instruction, context), output))
    if len(pairs) < 2:
        raise InputError(f"{file or ALPACA_HUB} holds too few examples to hold one out")
    held_out = min(200, max(1, len(pairs) // 10))
    return pairs[:held_out] if split == "dev" else pairs[held_out:]


def data_files(task: str, data: str | Path | None) -> list[Path]:
    """The files that a run reads, none if from the hub. Raises InputError if one is missing."""
    if data is None:
        return []
    if task == "alpaca":
        return [locate(data)]
    if task == "e2e":
        return [e2e_file(data, split) for split in E2E_FILES]
    return [glue_file(data, task, split) for split in ("train", *GLUE[task].dev)]


# ------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Example:
    """Token ids that are given, and what is to be learned: the ids of an answer, or a label (the
    number of a class, or a score)."""

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    label: float | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def targets(self) -> int:
        """How many terms this adds to the loss."""
        return len(self.answer) + (self.label is not None)


def encode_texts(tokenizer: Tokenizer, texts: tuple[str, ...], limit: int) -> list[int]:
    """One text, or two, as at most `limit` ids: the longer one is cut first.

    RoBERTa: <s> A </s> or <s> A </s></s> B </s>. A decoder, with its end-of-text token: A <end> or
    A <end> B <end>, so that its last token has read everything. Raises InputError if the checkpoint
    has no such tokens, or if nothing fits.
    """
    encoder = tokenizer.family == "roberta"
    start, gap, end = [tokenizer.bos] * encoder, [tokenizer.eos] * (1 + encoder), [tokenizer.eos]
    if None in start + end:
        raise InputError("the checkpoint's config.json names no bos_token_id or no eos_token_id")
    parts = [tokenizer.encode(text) for text in texts]
    room = limit - len(start + end) - len(gap) * (len(parts) - 1)
    if room < len(parts):
        raise InputError(f"{len(parts)} texts do not fit into {limit} tokens; raise --max-length")
    while sum(map(len, parts)) > room:
        max(reversed(parts), key=len).pop()
    ids = start + parts[0]
    for part in parts[1:]:
        ids += gap + part
    return ids + end


def encode_glue(tokenizer: Tokenizer, rows: list[Row], limit: int) -> list[Example]:
    """Rows of `read_glue` as Examples of at most `limit` tokens."""
    with tqdm(rows, "encode", leave=False) as bar:  # closed before an error is printed
        return [Example(encode_texts(tokenizer, texts, limit), label=label) for texts, label in bar]


def encode_prompt(tokenizer: Tokenizer, text: str, task: str = "e2e") -> list[int]:
    """E2E's prompt is ended by the end-of-text token, as in the LoRA code; Alpaca's begins with the
    tokens that the checkpoint starts a text with. Raises InputError if it has no end-of-text."""
    if tokenizer.eos is None:
        raise InputError("the checkpoint's config.json names no eos_token_id, which ends a text")
    ids = tokenizer.encode(text)
    return [*tokenizer.start, *ids] if task == "alpaca" else [*ids, tokenizer.eos]


def encode_pairs(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], limit: int, task: str = "e2e"
) -> list[Example]:
    """Prompts and answers as Examples of at most `limit` tokens. An answer ends with the token that
    ends a text, E2E's starts with a space; longer ones are cut. Prompts that leave no room for an
    answer are left out, and counted on the screen. Raises InputError if all are."""
    examples = []
    with tqdm(pairs, "encode", leave=False) as bar:  # closed before an error is printed
        for text, answer in bar:
            prompt = encode_prompt(tokenizer, text, task)
            answer = answer if task == "alpaca" else " " + answer.strip()
            ids = [*tokenizer.encode(answer), tokenizer.eos]
            if len(prompt) < limit:
                examples.append(Example(prompt, ids[: limit - len(prompt)]))
    if not examples:
        raise InputError(f"no prompt fits into {limit} tokens; raise --max-length")
    if left_out := len(pairs) - len(examples):
        print(f"left out {left_out} examples whose prompt alone fills {limit} tokens")
    return examples


def read_examples(
    tokenizer: Tokenizer, task: str, data: str | None, split: str, limit: int
) -> list[Example]:
    """One split of a task, read and encoded. Raises InputError."""
    if task in GLUE:
        return encode_glue(tokenizer, read_glue(data, task, split), limit)
    if task == "alpaca":
        return encode_pairs(tokenizer, read_alpaca(data, split), limit, task)
    pairs = [(e2e_prompt(mr), ref) for mr, ref in read_e2e(data, split)]
    return encode_pairs(tokenizer, pairs, limit)


def shuffled_batches(
    lengths: list[int], batch_size: int, seed: int, groups: int = 1
) -> list[list[int]]:
    """Indices in random batches. With `groups` > 1, examples are sorted by length within so many
    batches, so that little is padding, and the batches shuffled again."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    stretch = groups * batch_size
    pieces = [
        sorted(order[i : i + stretch].tolist(), key=lengths.__getitem__)
        for i in range(0, len(order), stretch)
    ]
    batches = [p[i : i + batch_size] for p in pieces for i in range(0, len(p), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


NO_TARGET = -100  # which F.cross_entropy leaves out


def collate(examples: list[Example], multiple: int = 1) -> Batch:
    """Pad on the right: N to a `multiple`, the M of answers to four times that, with NO_TARGET.
    `where` is computed here, on the CPU, so that the loss needs no search for its targets on the
    device. With no examples at all (a rank whose share of a batch is empty): one sequence of
    padding, which neither votes nor counts."""
    examples = examples or [Example([], [])]
    N = -(-max(1, *(len(e) for e in examples)) // multiple) * multiple
    ids = torch.zeros(len(examples), N, dtype=torch.long)
    mask, prompt = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    where, target = [], []  # of tokens, or of labels
    for i, e in enumerate(examples):
        ids[i, : len(e)] = torch.tensor(e.prompt + e.answer)
        mask[i, : len(e)] = True
        prompt[i, : len(e.prompt)] = True
        if e.label is None:
            where += range(i * N + len(e.prompt) - 1, i * N + len(e) - 1)
            target += e.answer
        else:
            where.append(i)
            target.append(e.label)
    more = -len(target) % (4 * multiple) if multiple > 1 and examples[0].label is None else 0
    where, target = where + more * [0], target + more * [NO_TARGET]
    kind = torch.float32 if any(isinstance(y, float) for y in target) else torch.long
    return Batch(ids, mask, prompt, torch.tensor(where).long(), torch.tensor(target, dtype=kind))


if __name__ == "__main__":
    from model import read_config

    folder = locate("nano/gpt2")
    tokenizer = Tokenizer.from_folder(folder, read_config(folder))
    examples = read_examples(tokenizer, "e2e", "nano/e2e", "train", 512)[:2]
    for e in examples:
        print(f"prompt  {tokenizer.decode(e.prompt)!r}\nanswer  {tokenizer.decode(e.answer)!r}")
        print("tokens ", [tokenizer.decode([i]) for i in e.prompt + e.answer][:12], "...")
    batch = collate(examples)
    print(f"ids     {tuple(batch.ids.shape)}, {batch.mask.sum()} of them real, rest padding")
    print(f"prompt  {batch.prompt.sum(1).tolist()} tokens; targets: {len(batch.target)}")
