"""The embedded data: restaurant descriptions in the E2E format, written by a small grammar.

The paper's generation experiments (Section 3, Table 2; Appendix B.2) fine-tune on the E2E NLG
Challenge (Novikova et al., 2017), where a *meaning representation* (MR) such as

    name[Pepperwood], eatType[pub], food[Thai], area[riverside]

is to be put into words. This script writes a small data set of that shape, so that a first run
works offline: the same three files, columns and attributes. Every name, phrase and sentence plan
is our own. Scores on it compare methods with each other, never with the published ones.

How a description comes about, in `realise`:
  1. the attributes of the MR are put in order and dealt out to one, two or three sentences;
  2. `introduce` writes the first sentence, which names the place, after one of eight plans;
  3. `follow_up` writes the others, which call it "it", "the place" or "the venue";
  4. every attribute is put into words from `PHRASES`, exactly once.
Wherever there is a choice the common option stands first and `pick` favours it: a core of frequent
patterns, which a small model can learn in a minute, and a long tail of rare ones.

    python nano/make_e2e.py        # writes nano/e2e/{trainset,devset,testset_w_refs}.csv anew
"""

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NAMES = """The Copper Ladle|Pepperwood|The Blunt Pencil|Saffron Lantern|The Crooked Spoon|Mirabel
The Quiet Otter|Juniper Table|The Amber Fork|Larkspur|The Walnut Door|Cinder and Salt|Tallow House
Marrowbone|The Painted Gate|Old Quince|The Lazy Magpie|Bellwether|The Glass Thimble|Rowan Corner
The Sleepy Badger|Thistledown|The Velvet Pear|Hazel Yard|The Paper Crane|Alder Room|The Tin Kettle
The Salty Plank|The Iron Whisk|Clover Lane|The Singing Hare|Tansy|The Broken Oar|Ember Hall
The Honey Jar|Fiddlehead|The Speckled Goose|Plum Street Kitchen|The Last Lantern|Nettlebed"""
NAMES = NAMES.replace("\n", "|").split("|")
UNSEEN_NAMES = NAMES[-6:]  # never in the training set: at test time they have to be copied
LANDMARKS = """Ashgrove Station|Marlin Theatre|Linden Park|Hollow Bridge|The Gilded Goat|Larch Hill
Beacon Library|Tanner Square|Café Solvang|Fern Street Market|Old Mint Hotel|The Drowsy Fox
Wexcombe Museum|Pilgrim Gardens|Café Amapola|Northgate Tower|Bishop Gallery|Kestrel Hall
Orchard House Hotel|Silverdale School|The Green Lattice|Quarry Stadium|The Merry Anchor
Harbour Lights Cinema"""
LANDMARKS = LANDMARKS.replace("\n", "|").split("|")

# Attribute -> its values, in the order in which the official files write the attributes.
VALUES = {
    "name": NAMES,
    "eatType": ["restaurant", "pub", "coffee shop"],
    "food": "Chinese English French Greek Indian Italian Japanese Mexican Thai".split(),
    "priceRange": ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
    "customer rating": ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    "area": ["riverside", "city centre"],
    "familyFriendly": ["yes", "no"],
    "near": LANDMARKS,
}
PLACES = ("area", "near")

# File -> how many MRs it has, and how many references an MR may have.
SPLITS = {
    "trainset.csv": (480, [4, 5]),
    "devset.csv": (60, [5, 6]),
    "testset_w_refs.csv": (70, [5, 6]),
}
MR_SIZES = [5, 4, 6, 3, 7, 2]  # attributes besides the name
SENTENCE_SIZES = [3, 2, 4, 1]  # attributes besides name and eatType

# The order in which a description tends to come to its attributes.
SALIENCE = ["food", "area", "near", "priceRange", "customer rating", "familyFriendly"]

# One piece of good news and one of bad are joined by "but" rather than "and".
NEWS = {
    "priceRange": {"cheap": 1, "less than £20": 1, "high": -1, "more than £30": -1},
    "customer rating": {"high": 1, "5 out of 5": 1, "low": -1, "1 out of 5": -1},
    "familyFriendly": {"yes": 1, "no": -1},
}

# (attribute, value, kind of phrase) -> phrases. The value "*" is any without a line of its own,
# and "{}" stands for it. The kinds: adjective, "a ... pub"; complement, "it is ..."; noun, "it has
# ..." or "with ..."; clause, a sentence of its own; place, "a pub ..." or "it is ...".
PHRASES = {
    ("food", "*", "adjective"): "{}",
    ("food", "*", "noun"): "{} food|{} dishes|{} cuisine",
    ("food", "*", "clause"): "the food is {}|the menu is {}|the kitchen cooks {} food",
    ("priceRange", "cheap", "adjective"): "cheap|inexpensive|low-priced",
    ("priceRange", "cheap", "complement"): "cheap|inexpensive",
    ("priceRange", "cheap", "noun"): "low prices|cheap prices",
    ("priceRange", "cheap", "clause"): "prices are low|eating there is cheap",
    ("priceRange", "moderate", "adjective"): "moderately priced|mid-priced|reasonably priced",
    ("priceRange", "moderate", "complement"): "moderately priced|reasonably priced",
    ("priceRange", "moderate", "noun"): "moderate prices|mid-range prices|reasonable prices",
    ("priceRange", "moderate", "clause"): "prices are moderate|prices are reasonable",
    ("priceRange", "high", "adjective"): "expensive|high-priced|pricey",
    ("priceRange", "high", "complement"): "expensive|pricey",
    ("priceRange", "high", "noun"): "high prices|steep prices",
    ("priceRange", "high", "clause"): "prices are high|eating there is expensive",
    ("priceRange", "less than £20", "noun"): "prices of less than £20|prices below £20",
    ("priceRange", "more than £30", "noun"): "prices of more than £30|prices above £30",
    ("priceRange", "*", "noun"): "prices of {}|prices in the {} range",
    ("priceRange", "*", "clause"): "prices are {}|a meal costs {}",
    ("customer rating", "low", "adjective"): "poorly rated|low-rated",
    ("customer rating", "low", "complement"): "poorly rated|rated poorly by customers",
    ("customer rating", "low", "noun"): "a low customer rating|poor customer reviews",
    ("customer rating", "low", "clause"): "customers rate it poorly|customer ratings are low",
    ("customer rating", "average", "noun"): "an average customer rating|average customer reviews",
    ("customer rating", "average", "clause"): "customer ratings are average",
    ("customer rating", "high", "adjective"): "highly rated|top-rated",
    ("customer rating", "high", "complement"): "highly rated|rated highly by customers",
    ("customer rating", "high", "noun"): "a high customer rating|excellent customer reviews",
    ("customer rating", "high", "clause"): "customers rate it highly|customer ratings are high",
    ("customer rating", "*", "complement"): "rated {} by customers|rated {}",
    ("customer rating", "*", "noun"): "a customer rating of {}|a {} customer rating",
    ("customer rating", "*", "clause"): "customers rate it {}|it scores {} with customers",
    ("area", "riverside", "place"): "by the riverside|in the riverside area|by the river",
    ("area", "city centre", "place"): "in the city centre|in the heart of the city",
    ("familyFriendly", "yes", "adjective"): "family-friendly|child-friendly|kid-friendly",
    ("familyFriendly", "yes", "complement"): "family-friendly|suitable for families",
    ("familyFriendly", "yes", "noun"): "a family-friendly atmosphere|a child-friendly atmosphere",
    ("familyFriendly", "yes", "clause"): "families are welcome|children are welcome",
    ("familyFriendly", "no", "adjective"): "adults-only",
    ("familyFriendly", "no", "complement"): "not family-friendly|not suitable for children",
    ("familyFriendly", "no", "noun"): "an adults-only policy",
    ("familyFriendly", "no", "clause"): "it does not cater for families|it is for adults only",
    ("near", "*", "place"): "near {}|close to {}|not far from {}|a short walk from {}",
}


def random_mr(rng: random.Random) -> dict[str, str]:
    """An MR: attribute -> value for the name and two to seven others, in the official order."""
    others = shuffled([a for a in VALUES if a != "name"], rng)[: pick(MR_SIZES, rng)]
    return {a: shuffled(VALUES[a], rng)[0] for a in VALUES if a == "name" or a in others}


def format_mr(mr: dict[str, str]) -> str:
    """The MR as the official files write it: `name[Pepperwood], eatType[pub], food[Thai]`."""
    return ", ".join(f"{attribute}[{value}]" for attribute, value in mr.items())


def realise(mr: dict[str, str], rng: random.Random) -> str:
    """A description of `mr` in one to three sentences that says each of its attributes once.

    Two calls give two paraphrases. Raises ValueError for an MR that the grammar cannot say.
    """
    known = all(value in VALUES.get(attribute, ()) for attribute, value in mr.items())
    if not known or "name" not in mr or len(mr) < 3:
        raise ValueError(
            f"cannot describe {format_mr(mr)}: give a name and two attributes or more, from VALUES"
        )
    rank = {a: i + 3 * rng.random() for i, a in enumerate(SALIENCE) if a in mr}
    if "area" in rank and "near" in rank:  # they go together, either one first
        rank["near"] = rank["area"] + rng.random() - 0.3
    rest = sorted(rank, key=rank.__getitem__)
    size = pick(SENTENCE_SIZES, rng)
    sentences = [introduce(mr, rest[:size], rng)]
    subject = "it"
    while rest := rest[size:]:
        size = pick(SENTENCE_SIZES, rng) if len(sentences) == 1 else len(rest)
        sentences.append(follow_up(mr, rest[:size], subject, rng))
        subject = pick(["it", "the place", "the venue"], rng)
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def introduce(mr: dict[str, str], attributes: list[str], rng: random.Random) -> str:
    """The first sentence: names the place, says its eatType if it has one, and `attributes`."""
    name, kind = mr["name"], mr.get("eatType")
    places = [a for a in attributes if a in PLACES]
    not_places = [a for a in attributes if a not in PLACES]
    not_food = [a for a in attributes if a != "food"]
    plans = {  # plan -> whether it leaves "a place" something to be described by
        "is": True,
        "apposition": kind or len(attributes) > 1,
        "located": places and (kind or not_places),
        "there is": True,
        "you will find": places and (kind or not_places),
        "subject": True,
        "serving": "food" in attributes and (kind or not_food),
        "try": "food" in attributes and (kind or not_food),
    }
    plan = pick([plan for plan in plans if plans[plan]], rng)
    if plan == "apposition":  # Tansy, a Thai pub, is by the river and has low prices.
        half = len(attributes) // 2
        description = describe(mr, attributes[:half], rng)
        return f"{name}, {description}, {predicate(mr, attributes[half:], rng)}"
    if plan == "located":  # Located by the river, Tansy is a Thai pub with low prices.
        verb = pick(["located ", "", "situated "], rng)
        return f"{verb}{where(mr, places, rng)}, {name} is {describe(mr, not_places, rng)}"
    if plan == "there is":  # There is a Thai pub by the river called Tansy with low prices.
        return f"there is {describe(mr, attributes, rng, called=name)}"
    if plan == "you will find":  # By the river, you will find Tansy, a Thai pub.
        return f"{where(mr, places, rng)}, you will find {name}, {describe(mr, not_places, rng)}"
    if plan == "subject":  # The pub Tansy serves Thai food at low prices.
        return f"{f'the {kind} {name}' if kind else name} {predicate(mr, attributes, rng)}"
    if plan == "serving":  # Serving Thai food, Tansy is a pub by the river.
        return f"serving {say(mr, 'food', 'noun', rng)}, {name} is {describe(mr, not_food, rng)}"
    if plan == "try":  # For Thai food, try Tansy, a pub by the river.
        wish = f"{pick(['for', 'if you like'], rng)} {say(mr, 'food', 'noun', rng)}"
        return f"{wish}, try {name}, {describe(mr, not_food, rng)}"
    return f"{name} is {describe(mr, attributes, rng)}"  # Tansy is a Thai pub by the river.


def follow_up(mr: dict[str, str], attributes: list[str], subject: str, rng: random.Random) -> str:
    """A later sentence, which says `attributes` of `subject`."""
    first, rest = attributes[0], attributes[1:]
    plan = pick(["predicate", "clause", "with"], rng)
    if plan == "clause":  # Prices are low, and it is by the river.
        if first in PLACES:
            clause = f"you will find {subject} {where(mr, [first], rng)}"
        else:
            clause = say(mr, first, "clause", rng)
        return f"{clause}, and it {predicate(mr, rest, rng)}" if rest else clause
    if plan == "with" and rest and first not in PLACES:  # It is by the river, with low prices.
        return f"{subject} {predicate(mr, rest, rng)}, with {say(mr, first, 'noun', rng)}"
    return f"{subject} {predicate(mr, attributes, rng)}"  # It has low prices and is by the river.


def predicate(mr: dict[str, str], attributes: list[str], rng: random.Random) -> str:
    """What follows the subject: "is cheap but poorly rated", "serves Thai food and is cheap"."""
    priced_food = {"food", "priceRange"} <= set(attributes) and rng.random() < 0.5
    verbs: dict[str, list[str]] = {}  # verb -> the attributes that share it
    for a in attributes:
        if a in PLACES:
            verb = "is located"
        elif a == "food" or (a == "priceRange" and priced_food):
            verb = "serves"
        else:
            verb = pick(["is", "has"], rng) if options(mr, a, "complement") else "has"
        verbs.setdefault(verb, []).append(a)
    parts = []
    for verb, shared in verbs.items():
        if verb == "is located":
            verb = pick(["is", "is located", "can be found"], rng)
            parts.append(f"{verb} {where(mr, shared, rng)}")
        elif verb == "serves":  # sorted: food before priceRange, "Thai food at low prices"
            food = " at ".join(say(mr, a, "noun", rng) for a in sorted(shared))
            parts.append(f"{pick(['serves', 'offers'], rng)} {food}")
        else:
            shared.sort(key=lambda a: a == "customer rating")  # "is cheap and rated 3 out of 5"
            kind = "complement" if verb == "is" else "noun"
            parts.append(f"{verb} {conjoin(mr, shared, kind, rng)}")
    return join(parts, conjunction(mr, attributes))


def describe(
    mr: dict[str, str], attributes: list[str], rng: random.Random, called: str = ""
) -> str:
    """A noun phrase: "a cheap Thai pub by the river called Tansy with a high customer rating"."""
    front = [a for a in attributes if options(mr, a, "adjective") and rng.random() < 0.5][:3]
    qualities = [a for a in front if a != "food"]
    adjectives = [say(mr, a, "adjective", rng) for a in qualities]
    comma = " but " if conjunction(mr, qualities) == "but" else ", "
    words = [comma.join(adjectives)] if adjectives else []
    words += [mr["food"]] if "food" in front else []
    words += [mr.get("eatType") or pick(["place", "venue", "establishment"], rng)]
    parts = ["an" if words[0][0].lower() in "aeiou" else "a", *words]

    places = [a for a in attributes if a in PLACES]
    rest = [a for a in attributes if a not in PLACES and a not in front]
    parts += [where(mr, places, rng)] if places else []
    parts += [pick(["called", "named"], rng), called] if called else []
    if rest and rest[0] == "food" and rng.random() < 0.3:
        parts += ["serving", say(mr, "food", "noun", rng)]
        rest = rest[1:]
    if rest and rng.random() < 0.6:
        parts += ["with", conjoin(mr, rest, "noun", rng)]
    elif rest:
        parts += ["that", predicate(mr, rest, rng)]
    return " ".join(parts)


def where(mr: dict[str, str], places: list[str], rng: random.Random) -> str:
    """The area, the landmark or both: "by the river near Linden Park"."""
    return " ".join(say(mr, a, "place", rng) for a in places)


def conjoin(mr: dict[str, str], attributes: list[str], kind: str, rng: random.Random) -> str:
    """The attributes as phrases of one kind in a row: "low prices but a low customer rating"."""
    return join([say(mr, a, kind, rng) for a in attributes], conjunction(mr, attributes))


def conjunction(mr: dict[str, str], attributes: list[str]) -> str:
    """ "but" for two attributes of which one is good news and the other bad, otherwise "and"."""
    news = sorted(NEWS.get(a, {}).get(mr[a], 0) for a in attributes)
    return "but" if news == [-1, 1] else "and"


def join(parts: list[str], word: str) -> str:
    """ "x", "x and y", "x, y and z"; a comma before "and" if a part has one of its own."""
    if len(parts) == 1:
        return parts[0]
    comma = "," if any(" and " in part or " but " in part for part in parts) else ""
    return f"{', '.join(parts[:-1])}{comma} {word} {parts[-1]}"


def options(mr: dict[str, str], attribute: str, kind: str) -> list[str]:
    """The phrases of this kind for the attribute's value in `mr`; none if there is no such kind."""
    value = mr[attribute]
    row = PHRASES.get((attribute, value, kind)) or PHRASES.get((attribute, "*", kind))
    return [phrase.format(value) for phrase in row.split("|")] if row else []


def say(mr: dict[str, str], attribute: str, kind: str, rng: random.Random) -> str:
    """One of `options`."""
    return pick(options(mr, attribute, kind), rng)


def pick(choices: Sequence[T], rng: random.Random) -> T:
    """One of the choices, the first ones most often: of four, every second time the first."""
    return choices[int(len(choices) * rng.random() ** 2)]


def shuffled(items: Sequence[str], rng: random.Random) -> list[str]:
    """The items in random order. Only `random()` itself is sure never to change with Python."""
    return sorted(items, key=lambda _: rng.random())


def make_splits(seed: int) -> dict[str, list[tuple[str, str]]]:
    """File name -> its (mr, ref) rows. No MR is in two files, no ref twice under one MR."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits = {}
    for file, (n_mrs, n_refs) in SPLITS.items():
        rows: list[tuple[str, str]] = []
        end = len(seen) + n_mrs
        while len(seen) < end:
            mr = random_mr(rng)
            if format_mr(mr) in seen or (file == "trainset.csv" and mr["name"] in UNSEEN_NAMES):
                continue
            seen.add(format_mr(mr))
            refs: dict[str, None] = {}  # a set that keeps its order
            count = pick(n_refs, rng)
            while len(refs) < count:
                refs[realise(mr, rng)] = None
            rows += [(format_mr(mr), ref) for ref in refs]
        splits[file] = rows
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded data set in the E2E format.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "e2e", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="0 gives the committed files")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for file, rows in make_splits(args.seed).items():
            with open(args.out / file, "w", encoding="utf-8", newline="") as f:
                csv.writer(f, lineterminator="\n").writerows([("mr", "ref"), *rows])
            print(f"{args.out / file}: {len({mr for mr, _ in rows})} MRs, {len(rows)} references")
    except OSError as e:
        parser.error(f"cannot write to {args.out}: {e.strerror}; choose another folder with --out")


if __name__ == "__main__":
    main()
