"""The embedded GLUE-format data: three small tasks about descriptions of restaurants.

The paper's first experiments (Section 3, Table 1; Appendix B.1) fine-tune RoBERTa on GLUE (Wang et
al., 2018). This script writes the like of three of its tasks, so that a first run works offline.
Files, columns and labels are the official ones. Every sentence is our own, made by the grammar of
make_e2e.py from a *meaning representation* (MR), which says what is true of a restaurant. Scores
on them compare methods with each other, never with the published ones.

  CoLA   Is the sentence acceptable? 1: a description as the grammar writes it. 0: the same with one
         to three of its small words (an article, a verb, "and", "near") behind the word that they
         belong before: "Tansy is Thai a pub". No word is added or lost, so order alone tells.
  MRPC   Do two descriptions say the same? 1: they are paraphrases, of one MR. 0: the second has
         other values for half of the attributes or more, one of which may be the name. Both say as
         much, and either could stand in a pair of the other label.
  STS-B  How much do two descriptions share? 5 x the attributes on whose value they agree / the
         attributes that one or both mention, from 0.000 to 5.000.

Where two values differ they also exclude each other: no pair sets "cheap" against "less than £20".
No MR is in both train and dev, not even of two tasks, and some names are only in dev.

    python nano/make_glue.py        # writes nano/glue/{CoLA,MRPC,STS-B}/{train,dev}.tsv anew
"""

import argparse
import random
import re
from pathlib import Path

from make_e2e import NEWS, UNSEEN_NAMES, VALUES, format_mr, pick, random_mr, realise, shuffled

MR = dict[str, str]  # attribute -> value
Example = tuple[list[MR], list[str]]  # what the row's descriptions say; the row

SIZES = {"train": 1600, "dev": 300}  # rows a task
HEADERS = {
    "CoLA": "",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t"
    "sentence1\tsentence2\tscore\n",
}

# These words stand right before what they belong to, and wherever the grammar uses one it cannot
# change places with the next unit. (Many others can: "It is cheap" and "Is it cheap".)
HEADS = "a an the and but that is are has can will does rate with of by in near to from for".split()
# What changes places: a name, an adverb with what it modifies, or else a word.
NAMES = "|".join(VALUES["name"] + VALUES["near"])
UNITS = re.compile(f"({NAMES}|[a-z]+ly (?:rated|priced)|[^ ,.]+)")


def scramble(text: str, rng: random.Random) -> str:
    """The description with one to three of its HEADS behind the unit that followed them; as it was
    if it has none. Commas, full stops and the first word of each sentence stay where they are."""
    parts = UNITS.split(text)  # units at odd places, what parts them at even ones
    places = [
        i
        for i in range(1, len(parts) - 2, 2)
        if parts[i] in HEADS
        and parts[i + 1] == " "
        and parts[i + 2] not in VALUES["food"]  # "Tansy Thai has food" might be one's name
    ]
    count, moved = pick([2, 1, 3], rng), set()
    for i in sorted(places, key=lambda _: rng.random()):
        if len(moved) < 2 * count and not moved & {i, i + 2}:
            parts[i], parts[i + 2] = parts[i + 2], parts[i]
            moved |= {i, i + 2}
    return "".join(parts)


def excludes(attribute: str, value: str, other: str) -> bool:
    """Whether the two values cannot both be true. Of prices and ratings it is by NEWS that words
    and numbers compare: "high" and "5 out of 5" are both good, "average" and "3 out of 5" not."""
    news = NEWS.get(attribute, {})
    return value != other and (not news or news.get(value, 0) != news.get(other, 0))


def alter(mr: MR, rng: random.Random) -> MR:
    """`mr` with other values, which exclude the old ones, for half of its attributes or more."""
    count = shuffled(range((len(mr) + 1) // 2, len(mr) + 1), rng)[0]
    changes = {
        a: shuffled([v for v in VALUES[a] if excludes(a, mr[a], v)], rng)[0]
        for a in shuffled([*mr], rng)[:count]
    }
    return {**mr, **changes}


def mix(mr: MR, rng: random.Random) -> MR:
    """An MR that shares more or less with `mr`: each attribute, or the lack of it, comes from `mr`
    or from a random MR, with random odds. Values that differ exclude each other."""
    other, odds = random_mr(rng), 0.9 * rng.random()
    mixed = {}
    for a in VALUES:
        alike = a in mr and a in other and not excludes(a, mr[a], other[a])
        source = mr if rng.random() < odds or alike else other
        mixed |= {a: source[a]} if a in source else {}
    return mixed if len(mixed) >= 3 else mix(mr, rng)  # the grammar wants two besides the name


def realise_pair(first: MR, second: MR, rng: random.Random) -> list[str]:
    """A description of each, never twice the same text."""
    texts = [realise(first, rng), realise(second, rng)]
    return texts if texts[0] != texts[1] else realise_pair(first, second, rng)


def cola(number: int, rng: random.Random) -> Example:
    """Source, label, star, sentence. Any that can be scrambled may be of either kind."""
    mr = random_mr(rng)
    text = realise(mr, rng)
    wrong = scramble(text, rng)
    if wrong == text:  # "Tansy serves Thai food."
        return cola(number, rng)
    return [mr], ["nano", "0", "*", wrong] if rng.random() < 0.42 else ["nano", "1", "", text]


def mrpc(number: int, rng: random.Random) -> Example:
    """Label, two ids, two descriptions."""
    mr = random_mr(rng)
    same = rng.random() < 0.5
    mrs = [mr, mr if same else alter(mr, rng)]
    ids = [str(2 * number + 1), str(2 * number + 2)]
    return mrs, [str(int(same)), *ids, *realise_pair(*mrs, rng)]


def stsb(number: int, rng: random.Random) -> Example:
    """Index, six columns on where a pair is from, two descriptions, score."""
    mr = random_mr(rng)
    other = mix(mr, rng)
    score = 5 * len(mr.items() & other.items()) / len(mr.keys() | other.keys())
    origin = ["restaurants", "nano", "none", str(number), "none", "none"]
    return [mr, other], [str(number), *origin, *realise_pair(mr, other, rng), f"{score:.3f}"]


def make_files(seed: int) -> dict[str, list[Example]]:
    """File -> its examples. No MR is in both train and dev, whatever the task."""
    rng = random.Random(seed)
    split_of: dict[str, str] = {}  # the split in which an MR was first
    files = {}
    for task, make in {"CoLA": cola, "MRPC": mrpc, "STS-B": stsb}.items():
        for split, size in SIZES.items():
            examples = files[f"{task}/{split}.tsv"] = []
            while len(examples) < size:
                mrs, row = make(len(examples), rng)
                keys = [format_mr(mr) for mr in mrs]
                if split == "train" and any(mr["name"] in UNSEEN_NAMES for mr in mrs):
                    continue
                if all(split_of.get(key, split) == split for key in keys):
                    split_of |= dict.fromkeys(keys, split)
                    examples.append((mrs, row))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded data sets in the GLUE format.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "glue", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="0 gives the committed files")
    args = parser.parse_args()
    try:
        for file, examples in make_files(args.seed).items():
            path = args.out / file
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = ["\t".join(row) + "\n" for _, row in examples]
            text = HEADERS[path.parent.name] + "".join(rows)
            path.write_text(text, encoding="utf-8", newline="")
            print(f"{path}: {len(examples)} rows")
    except OSError as e:
        parser.error(f"cannot write to {args.out}: {e.strerror}; choose another folder with --out")


if __name__ == "__main__":
    main()
