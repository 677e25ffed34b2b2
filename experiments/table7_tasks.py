"""Table 7's data: the files of SentEval's ten probing tasks, and three of them made of plain text.

A file has a line for each sentence: tr, va or te (to train, validate or test on), the label, the
sentence, with tabs between. table7_probing.py reads them; this makes sentence_length.txt,
word_content.txt and bigram_shift.txt where SentEval's own are not at hand, by the definitions in
its data/probing/README.md.

    python experiments/table7_tasks.py --text DIR --out TASKS        of all DIR/*.txt
    python experiments/table7_probing.py --model gpt2 --senteval TASKS

A line of the text is a paragraph, a sentence ends after . ! or ? and a space. Its tokens are words,
with hyphens and apostrophes in them, and single signs. It is kept if they are 5 to 28 and the last
is . ! or ?, each wording once. Half of the sentences are for training, a quarter each to validate
and to test.

    SentLen   the number of tokens in six bins, 5-8, 9-12, 13-16, 17-20, 21-25, 26-28
    WC        which of up to 1,000 words is there, once, and no other of them: words of four letters
              or more from frequency rank 2,001 on, or from the middle of a smaller vocabulary
    BShift    SentLen's sentences without double quotes: in every other one a random word, not the
              first, has changed places with the next one
"""

import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.cli import Parser, at_least, command_line
from support.files import InputError, make_folder, write_text

FILES = {  # SentEval's, in the order of Table 7
    "SentLen": "sentence_length",
    "WC": "word_content",
    "TreeD": "tree_depth",
    "TopConst": "top_constituents",
    "BShift": "bigram_shift",
    "Tense": "past_present",
    "SubjNum": "subj_number",
    "ObjNum": "obj_number",
    "SOMO": "odd_man_out",
    "CoordInv": "coordination_inversion",
}
BINS = [range(5, 9), range(9, 13), range(13, 17), range(17, 21), range(21, 26), range(26, 29)]
SHARES = {"tr": 1.0, "va": 0.5, "te": 0.5}  # of --size
Task = dict[str, list[tuple[str, str]]]  # "tr", "va", "te": rows of label, sentence


def read_lines(*paths: Path) -> list[str]:
    """All lines of the files. Raises InputError if one cannot be read."""
    try:
        texts = [path.read_text("utf-8").rstrip("\n") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {', '.join(map(str, paths))}: {error}") from None
    return [line for text in texts for line in text.split("\n")]


def read_senteval(folder: Path, task: str, size: int | None) -> Task:
    """One of SentEval's files, its first `size` training rows and half as many of the others, or
    all. Raises InputError with file and line."""
    path, rows = folder / f"{FILES[task]}.txt", {split: [] for split in SHARES}
    for number, line in enumerate(read_lines(path), 1):
        split, *fields = line.rstrip("\r").split("\t")
        if split not in rows or len(fields) < 2:
            raise InputError(f"{path}, line {number}: not tr, va or te, a label and a sentence")
        rows[split].append((fields[0], fields[-1]))
    labels = {split: {label for label, _ in rows[split]} for split in rows}
    for split in rows:
        if not labels[split] or labels[split] - labels["tr"]:
            raise InputError(f"{path}: {split} has no rows, or labels that tr has not")
    return rows if size is None else {s: rows[s][: int(size * SHARES[s])] for s in rows}


def sentences(texts: Iterable[str]) -> list[list[str]]:
    """The different sentences of the texts, as lists of tokens. See the top of this file."""
    found, end = {}, r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[DM]r\.)(?<!\bMrs\.)[\"'”’)]*\s+"
    for text in texts:
        for sentence in re.split(end, text):  # not after initials and titles
            tokens = re.findall(r"\w+(?:[-'’]\w+)*|[^\w\s]", sentence)
            if 5 <= len(tokens) <= 28 and tokens[-1] in ".!?":
                found.setdefault(" ".join(tokens).lower(), tokens)
    return list(found.values())


def swaps(tokens: list[str]) -> list[int]:
    """The places i > 0 where tokens i and i + 1 are two different words; none in a quotation."""
    if set(tokens) & set('"“”'):
        return []
    word = [token[0].isalnum() for token in tokens]
    pairs = ((i, i + 1) for i in range(1, len(tokens) - 1))
    return [i for i, j in pairs if word[i] and word[j] and tokens[i].lower() != tokens[j].lower()]


def draw(groups: dict[str, list], size: int) -> list[tuple[str, list[str]]]:
    """Equally many (label, tokens) of each group, `size` together or what the rarest one allows."""
    n = min([size // max(1, len(groups)), *map(len, groups.values())])
    return [(label, tokens) for label, group in groups.items() for tokens in group[:n]]


def make_tasks(texts: Iterable[str], size: int, most: int) -> dict[str, Task]:
    """SentLen, WC and BShift from plain text, with `size` training sentences each or as many as the
    text allows; WC with `most` words, 10 or more training sentences for each."""
    pool, rng = sentences(texts), random.Random(0)
    rng.shuffle(pool)
    half, rest, most = len(pool) // 2, len(pool) * 3 // 4, min(most, size // 10)
    parts = {"tr": range(half), "va": range(half, rest), "te": range(rest, len(pool))}

    where = defaultdict(list)  # word -> the sentences it is in, as often as it is there
    for i, tokens in enumerate(pool):
        for token in tokens:
            where[token.lower()].append(i)
    ranked = sorted((w for w in where if w[0].isalnum()), key=lambda w: -len(where[w]))
    words, hits = [], Counter()  # hits: how many of the chosen words a sentence has
    for w in ranked[min(2000, len(ranked) // 2) :]:
        enough = sum(not hits[i] for i in where[w]) >= 2 * size // most
        if enough and len(words) < most and len(w) >= 4 and w.isalpha():
            words.append(w)
            hits.update(where[w])

    tasks: dict[str, Task] = {"SentLen": {}, "WC": {}, "BShift": {}}
    alone = {
        s: {w: [pool[i] for i in where[w] if hits[i] == 1 and i in part] for w in words}
        for s, part in parts.items()
    }
    rare = {w for s in parts for w in words if len(alone[s][w]) < size * SHARES[s] // most}
    for s, part in parts.items():
        count = int(size * SHARES[s])
        bins = {str(k): [pool[i] for i in part if len(pool[i]) in b] for k, b in enumerate(BINS)}
        made = {"SentLen": draw(bins, count), "BShift": []}
        made["WC"] = draw({w: alone[s][w] for w in words if w not in rare}, count)
        calm = [tokens for _, tokens in made["SentLen"] if swaps(tokens)]
        for keep, invert in zip(calm[::2], calm[1::2], strict=False):
            i = rng.choice(swaps(invert))
            moved = [*invert[:i], invert[i + 1], invert[i], *invert[i + 2 :]]
            made["BShift"] += [("O", keep), ("I", moved)]
        for name, rows in made.items():
            tasks[name][s] = [(label, " ".join(tokens)) for label, tokens in rows]
    return tasks


def write_tasks(folder: Path, texts: Iterable[str], size: int, most: int) -> None:
    """The tasks of `make_tasks` as SentEval's files. Raises InputError if the text is too little
    for one of them."""
    tasks = make_tasks(texts, size, most)
    for name, task in tasks.items():
        if not all(task.values()) or len({label for label, _ in task["tr"]}) < 2:
            raise InputError(f"too little text to make {name} of; give more, or a larger --size")
    make_folder(folder)
    for name, task in tasks.items():
        lines = [f"{split}\t{label}\t{text}\n" for split in task for label, text in task[split]]
        write_text(folder / f"{FILES[name]}.txt", "".join(lines))


def main() -> None:
    parser = Parser(description="Make SentLen, WC and BShift of plain text, in SentEval's format")
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="holds *.txt")
    parser.add_argument("--out", type=Path, required=True, metavar="TASKS", help="folder to write")
    what = "training sentences, and half as many to validate and to test (1000)"
    parser.add_argument("--size", type=at_least(20), default=1000, help=what)
    parser.add_argument("--words", type=at_least(2), default=1000, help="of WC, at most (1000)")
    args = parser.parse_args()
    texts = read_lines(*sorted(args.text.glob("*.txt")) or [args.text / "*.txt"])
    write_tasks(args.out, texts, args.size, args.words)
    print(f"{args.out}: SentLen, WC and BShift")


if __name__ == "__main__":
    command_line(main)
