"""Texts to batches: the tokenizer; GLUE, E2E and Alpaca from files or the hub (appendix B, E.3).

The tokenizer is the checkpoint's own byte-pair encoding, computed by support/tokenizers.py. Text is
data: a string that happens to contain "<|endoftext|>" is encoded as those thirteen characters.

    python data.py                      two examples of nano/e2e: text, tokens, batch
"""

import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import Config
from support.cli import progress_bar
from support.files import InputError, from_hub, locate, parse_json, read_table, read_text
from support.tokenizers import BytePairs, read_tokenizer


class Tokenizer:
    """Text to the checkpoint's ids and back.

    bpe: the checkpoint's byte-pair encoding, see support/tokenizers.py. start: ids that the
    checkpoint puts before a text (Llama 3's <|begin_of_text|>). bos, eos and pad come from the
    checkpoint's config (None if it has none). Special tokens are never produced from text.
    """

    def __init__(self, config: Config, bpe: BytePairs) -> None:
        self.encoder = not config.causal
        self.bos, self.ends, self.pad = config.bos, config.ends, config.pad
        self.eos = self.ends[0] if self.ends else None
        self.bpe, self.start = bpe, bpe.start

    @classmethod
    def load(cls, name: str | Path, config: Config) -> "Tokenizer":
        """The tokenizer of a checkpoint folder or hub name. Raises InputError if it has none, or
        one that is not supported."""
        special = {config.bos, *config.ends, config.pad}
        return cls(config, read_tokenizer(name, config.vocab_size, special))

    def encode(self, text: str) -> list[int]:
        """Half a surrogate pair counts as U+FFFD. A byte that the vocabulary lacks (some control
        characters in SmolLM2's) is left out."""
        return self.bpe.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Special tokens are left out."""
        return self.bpe.decode(ids)


E2E_FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
# The tokenized copy ("family - friendly") with which the LoRA paper trained and scored, from its
# repository's examples/NLG/data/e2e. Each line is a prompt and a reference.
E2E_TOKENIZED = {"train": "train.txt", "dev": "valid.txt", "test": "test.txt"}
E2E_HUB = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
# The names that Li & Liang (2021), and after them the LoRA paper, use in the prompt.
E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
PAIR = r"\s*[^][,\s][^][,]*\[[^][]*\]\s*"  # an MR is one or more name[value], or in form
MR = re.compile(rf"(?P<in_form>[^][|:]+ : [^|]*( \| [^][|:]+ : [^|]*)*)|{PAIR}(,{PAIR})*")


def e2e_prompt(mr: str) -> str:
    """A meaning representation (MR) as the model reads it: "name[Blue Spice], eatType[pub]" becomes
    "name : Blue Spice | Type : pub". The tokenized copy has that form already."""
    found = MR.fullmatch(mr)
    if not found:
        raise InputError(f"malformed MR {mr!r}; write it as name[Blue Spice], eatType[pub]")
    if found["in_form"]:
        return mr
    parts = []
    for name, value in re.findall(r"([^][,]+)\[([^][]*)\]", mr):
        name = name.strip()
        parts.append(f"{E2E_NAMES.get(name, name)} : {value.strip()}")
    return " | ".join(parts)


def is_tokenized(folder: str | Path | None) -> bool:
    """Whether `folder` holds the LoRA paper's text. If it has both, the official files count."""
    if folder is None or (locate(folder) / E2E_FILES["train"]).exists():
        return False
    return (locate(folder) / E2E_TOKENIZED["train"]).exists()


def e2e_file(folder: str | Path, split: str) -> Path:
    """The file of a split. Raises InputError if it is not there."""
    files = E2E_TOKENIZED if is_tokenized(folder) else E2E_FILES
    path = locate(folder) / files[split]
    if not path.is_file():
        official, tokenized = ", ".join(E2E_FILES.values()), ", ".join(E2E_TOKENIZED.values())
        raise InputError(
            f"{path} is missing; --data DIR must hold {official}, or LoRA's {tokenized}"
        )
    return path


def read_e2e(
    folder: str | Path | None, split: str, check: Callable[[str], object] = e2e_prompt
) -> list[tuple[str, str]]:
    """The (MR, reference) pairs of "train", "dev" or "test", from `folder` or, if None, from the
    challenge's repository. `check` raises InputError for an MR that is not wanted. Raises
    InputError with file and line."""
    if folder is None:
        url = E2E_HUB + E2E_FILES[split]
        table = from_hub("the E2E data", "DIR", "csv", data_files=url, split="train")
        rows = [(f"{url}, row {i}", row) for i, row in enumerate(table, start=1)]
    else:
        form = dict(delimiter="||", header=("mr", "ref")) if is_tokenized(folder) else {}
        rows = read_table(e2e_file(folder, split), ["mr", "ref"], **form)
    pairs = []  # each has a reference, and an MR that can be read
    for where, row in rows:
        if not row["ref"].strip():
            raise InputError(f"{where}: the reference is empty")
        try:
            check(row["mr"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        pairs.append((row["mr"].strip(), row["ref"]))
    return pairs


def group_references(pairs: list[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    """The distinct MRs, in order of appearance, and the references of each."""
    groups: dict[str, list[str]] = {}
    for mr, ref in pairs:
        groups.setdefault(mr, []).append(ref)
    return list(groups), list(groups.values())


GLUE_HUB = "nyu-mll/glue"
Row = tuple[tuple[str, ...], float]  # one or two texts; the number of the label, or the score


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE (Wang et al., 2018): its official files and the metric of Table 1."""

    folder: str
    texts: tuple[str, ...]  # the columns of the sentence, or of the two
    label: str  # the column of the label
    labels: tuple[str, ...] = ()  # in the hub's order; none: a score from 0 to 5
    metric: str = "accuracy"
    dev: tuple[str, ...] = ("dev",)
    header: tuple[str, ...] = ()  # the columns, if the files do not say
    ragged: bool = False  # the official file has broken rows

    def target(self, value: str, where: str) -> float:
        """The number of a label, or a score."""
        if self.labels and value not in self.labels:
            raise InputError(f"{where}: label {value!r} is not one of {', '.join(self.labels)}")
        if self.labels:
            return self.labels.index(value)
        if not re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", value):
            raise InputError(f"{where}: score {value!r} is not a number from 0 to 5")
        return float(value)


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


def glue_file(folder: str | Path, task: str, split: str) -> Path:
    """The official file of a split. Raises InputError if it is not there."""
    path = locate(folder) / GLUE[task].folder / f"{split}.tsv"
    if not path.is_file():
        raise InputError(f"{path} is missing; --data DIR must hold GLUE's own folders, such as RTE")
    return path


def read_glue(folder: str | Path | None, task: str, split: str) -> list[Row]:
    """The rows of "train", "dev" or, for MNLI, "dev_matched" and "dev_mismatched", from the
    official TSV files in `folder` or, if None, from the hub. A quotation mark is text: these files
    quote nothing. Raises InputError with file and line."""
    spec = GLUE[task]
    if folder is None:
        table = from_hub(GLUE_HUB, "DIR", GLUE_HUB, task, split=split.replace("dev", "validation"))
        columns = [name for name in table.column_names if name not in ("label", "idx")]  # texts
        texts = zip(*(table[name] for name in columns), strict=True)
        return list(zip(texts, table["label"], strict=True))
    rows = []
    columns = [*spec.texts, spec.label]
    path = glue_file(folder, task, split)
    for where, row in read_table(path, columns, "\t", spec.header, spec.ragged):
        texts = tuple(row[name] for name in spec.texts)
        rows.append((texts, spec.target(row[spec.label], where)))
    return rows


ALPACA_HUB = "tatsu-lab/alpaca"


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The template of Taori et al. (2023), up to the response; `context` is the data's "input"."""
    text = "Below is an instruction that describes a task"
    if context:
        text += ", paired with an input that provides further context"
    text += ". Write a response that appropriately completes the request."
    text += f"\n\n### Instruction:\n{instruction}"
    if context:
        text += f"\n\n### Input:\n{context}"
    return text + "\n\n### Response:"


def read_alpaca(file: str | Path | None, split: str) -> list[tuple[str, str]]:
    """(prompt, response) of "train" or "dev", from a JSON or JSONL file with the fields
    instruction, input and output or, if None, from the hub. There is no official split: dev is the
    first 200 examples, as in Meta's llama-recipes, or a tenth of a smaller file."""
    if file is None:
        rows = from_hub(ALPACA_HUB, "FILE", ALPACA_HUB, split="train").to_list()
    else:
        text = read_text(locate(file))
        rows = parse_json(text, file, lines=text.lstrip()[0] != "[")
    pairs = []  # those with all that an example needs
    for n, row in enumerate(rows, start=1):
        names = ("instruction", "input", "output")
        texts = [row.get(name) or "" for name in names] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not (texts[0] and texts[2]):
            if file is None:  # the hub's data have a few empty outputs
                continue
            raise InputError(f"{file}, example {n} lacks an instruction or an output text")
        instruction, context, output = texts
        pairs.append((alpaca_prompt(instruction, context), output))
    if len(pairs) < 2:
        raise InputError(f"{file or ALPACA_HUB} holds too few examples to hold one out")
    held_out = min(200, max(1, len(pairs) // 10))
    return pairs[:held_out] if split == "dev" else pairs[held_out:]


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
    """One text, or two, as at most `limit` ids; the longer text is cut first.

    RoBERTa: <s> A </s> or <s> A </s></s> B </s>. A decoder: A <end> or A <end> B <end>, so that its
    last token has read everything. Raises InputError if the checkpoint has no such tokens.
    """
    start = [tokenizer.bos] if tokenizer.encoder else []
    gap = [tokenizer.eos, tokenizer.eos] if tokenizer.encoder else [tokenizer.eos]
    end = [tokenizer.eos]
    if None in start + end:
        raise InputError("the checkpoint's config.json names no bos_token_id or no eos_token_id")
    parts = [tokenizer.encode(text) for text in texts]
    room = limit - len(start) - len(end) - len(gap) * (len(parts) - 1)
    if room < len(parts):
        raise InputError(f"{len(parts)} texts do not fit into {limit} tokens; raise --max-length")
    while sum(map(len, parts)) > room:  # the longer text is cut
        longest = max(reversed(parts), key=len)  # of two like ones the second
        longest.pop()
    ids = start + parts[0]  # then a gap before each further text
    for part in parts[1:]:
        ids += gap + part
    return ids + end


def encode_glue(tokenizer: Tokenizer, rows: list[Row], limit: int) -> list[Example]:
    """Rows of `read_glue` as examples of at most `limit` tokens."""
    examples = []
    for texts, label in progress_bar(rows, "encode", leave=False):
        examples.append(Example(encode_texts(tokenizer, texts, limit), label=label))
    return examples


def encode_prompt(tokenizer: Tokenizer, text: str, task: str = "e2e") -> list[int]:
    """E2E's prompt ends with the end-of-text token, as in the LoRA code. Any other begins with what
    the checkpoint puts before a text."""
    if tokenizer.eos is None:
        raise InputError("the checkpoint's config.json names no eos_token_id, which ends a text")
    ids = tokenizer.encode(text)
    return ids + [tokenizer.eos] if task == "e2e" else tokenizer.start + ids


def encode_pairs(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], limit: int, task: str = "e2e"
) -> list[Example]:
    """Prompts and answers as examples of at most `limit` tokens; longer answers are cut. An answer
    ends with the end-of-text token; E2E's starts with a space. A prompt that leaves no room for an
    answer is left out, which is said."""
    examples = []
    for text, answer in progress_bar(pairs, "encode", leave=False):
        prompt = encode_prompt(tokenizer, text, task)
        if len(prompt) >= limit:
            continue  # there is no room for an answer
        answer = answer if task == "alpaca" else " " + answer.strip()
        ids = tokenizer.encode(answer) + [tokenizer.eos]
        examples.append(Example(prompt, ids[: limit - len(prompt)]))
    if not examples:
        raise InputError(f"no prompt fits into {limit} tokens; raise --max-length")
    if len(examples) < len(pairs):
        left_out = len(pairs) - len(examples)
        print(f"left out {left_out} examples whose prompt alone fills {limit} tokens")
    return examples


@dataclass(frozen=True)
class TextTask:
    """A task whose answers are texts."""

    folder: str
    metric: str = "dev_loss"  # finds the best epoch: the lowest loss, in GLUE the highest metric
    dev: tuple[str, ...] = ("dev",)


TASKS = ChainMap({"e2e": TextTask("e2e"), "alpaca": TextTask("alpaca")}, GLUE)


def read_examples(
    tokenizer: Tokenizer, task: str, data: str | None, split: str, limit: int
) -> list[Example]:
    """One split of a task, read and encoded."""
    if task in GLUE:
        return encode_glue(tokenizer, read_glue(data, task, split), limit)
    if task == "alpaca":
        return encode_pairs(tokenizer, read_alpaca(data, split), limit, task)
    pairs = [(e2e_prompt(mr), ref) for mr, ref in read_e2e(data, split)]
    return encode_pairs(tokenizer, pairs, limit)


def data_files(task: str, data: str | Path | None) -> list[Path]:
    """The files that a run reads, none if from the hub. Raises InputError if one is missing."""
    if data is None:
        return []
    if task == "alpaca":
        return [locate(data)]
    if task == "e2e":
        return [e2e_file(data, split) for split in E2E_FILES]
    return [glue_file(data, task, split) for split in ("train", *GLUE[task].dev)]


NO_TARGET = -100  # which F.cross_entropy leaves out


class Batch(NamedTuple):
    """B sequences, padded on the right to N tokens, with M targets in all."""

    ids: Tensor  # (B, N)
    mask: Tensor  # (B, N) bool, real tokens
    prompt: Tensor  # (B, N) bool, tokens that are given
    where: Tensor  # (M,) what predicts each target: a place in the flattened (B * N), or a sequence
    target: Tensor  # (M,) a token, a label or (float) a score

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in self))


def shuffled_batches(
    lengths: list[int], batch_size: int, seed: int, groups: int = 1
) -> list[list[int]]:
    """Indices in random batches. With `groups` > 1 the examples of so many batches are sorted by
    length first, so that little is padding, and the batches shuffled again."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths)).tolist()
    stretch = groups * batch_size
    batches = []
    for i in range(0, len(order), stretch):
        alike = sorted(order[i : i + stretch], key=lambda index: lengths[index])
        batches += [alike[j : j + batch_size] for j in range(0, len(alike), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def by_length(examples: list, batch_size: int, what: str) -> Iterator[list[int]]:
    """Batches of the examples' indices, of like length together, with a progress bar."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    with progress_bar(total=len(order), desc=what, leave=False) as bar:
        for i in range(0, len(order), batch_size):
            indices = order[i : i + batch_size]
            yield indices
            bar.update(len(indices))


def collate(examples: list[Example], multiple: int = 1) -> Batch:
    """Pad on the right. For CUDA graphs N is rounded up to a `multiple`, and the M of answers to
    four times that, with NO_TARGET. Without examples (a process whose share of a batch is empty):
    one sequence of padding, which neither votes nor counts."""
    # 1) Their ids side by side.
    examples = examples or [Example([], [])]
    N = max(1, *(len(e) for e in examples))
    N = math.ceil(N / multiple) * multiple
    ids = torch.zeros(len(examples), N, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    prompt = torch.zeros_like(mask)
    # 2) What is to be predicted, and where.
    where, target = [], []
    for i, e in enumerate(examples):
        ids[i, : len(e)] = torch.tensor(e.prompt + e.answer)
        mask[i, : len(e)] = True
        prompt[i, : len(e.prompt)] = True
        if e.label is not None:
            where.append(i)
            target.append(e.label)
        else:  # each token of the answer is predicted from the place before it
            first = i * N + len(e.prompt) - 1
            where += range(first, first + len(e.answer))
            target += e.answer
    if multiple > 1 and examples[0].label is None:
        missing = -len(target) % (4 * multiple)
        where += missing * [0]
        target += missing * [NO_TARGET]
    scores = any(isinstance(y, float) for y in target)
    target = torch.tensor(target, dtype=torch.float32 if scores else torch.long)
    return Batch(ids, mask, prompt, torch.tensor(where, dtype=torch.long), target)


if __name__ == "__main__":
    tokenizer = Tokenizer.load("nano/gpt2", Config.load("nano/gpt2"))
    examples = read_examples(tokenizer, "e2e", "nano/e2e", "train", 512)[:2]
    for e in examples:
        print(f"prompt  {tokenizer.decode(e.prompt)!r}\nanswer  {tokenizer.decode(e.answer)!r}")
        print("tokens ", [tokenizer.decode([i]) for i in e.prompt + e.answer][:12], "...")
    batch = collate(examples)
    print(f"ids     {tuple(batch.ids.shape)}, {batch.mask.sum()} of them real, rest padding")
    print(f"prompt  {batch.prompt.sum(1).tolist()} tokens; targets: {len(batch.target)}")
