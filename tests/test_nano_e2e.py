"""The embedded E2E-format data set (nano/make_e2e.py): its files, its grammar, its English.

pytest tests/test_nano_e2e.py
"""

import csv
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import make_e2e
import pytest

NANO = Path(__file__).resolve().parent.parent / "nano"

FILES = ("trainset.csv", "devset.csv", "testset_w_refs.csv")
OTHERS = [a for a in make_e2e.VALUES if a not in ("name", "eatType")]
KINDS = {kind for _, _, kind in make_e2e.PHRASES}


def rows(file: str) -> list[tuple[str, str]]:
    with open(NANO / "e2e" / file, encoding="utf-8", newline="") as f:
        header, *body = csv.reader(f)
    assert header == ["mr", "ref"]
    return [(mr, ref) for mr, ref in body]


def parse_mr(text: str) -> dict[str, str]:
    return dict(re.fullmatch(r"(.+)\[(.+)\]", part).groups() for part in text.split(", "))


REFS = [(parse_mr(mr), ref) for file in FILES for mr, ref in rows(file)]


def phrase_book() -> dict[str, tuple[str, str]]:
    """Lower-case phrase -> the (attribute, value) that it expresses, for the whole grammar."""
    book: dict[str, tuple[str, str]] = {}
    for attribute, values in make_e2e.VALUES.items():
        for value in values:
            phrases = [value] if attribute in ("name", "eatType") else []
            for kind in KINDS if attribute in OTHERS else ():
                phrases += make_e2e.options({attribute: value}, attribute, kind)
            for phrase in phrases:
                meaning = book.setdefault(phrase.lower(), (attribute, value))
                assert meaning == (attribute, value), f"{phrase!r} is ambiguous"
    return book


BOOK = phrase_book()
LONGEST_FIRST = "|".join(map(re.escape, sorted(BOOK, key=len, reverse=True)))
PHRASE = re.compile(rf"(?<!\w)(?:{LONGEST_FIRST})(?!\w)", re.IGNORECASE)


def read(ref: str) -> list[tuple[str, str]]:
    """What a description says, read back from it, in alphabetical order."""
    return sorted(BOOK[phrase.lower()] for phrase in PHRASE.findall(ref))


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(NANO / "make_e2e.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_script_reproduces_the_committed_files(tmp_path):
    for hash_seed in ("1", "2"):  # the order of a set must not matter
        out = tmp_path / hash_seed
        done = run("--out", str(out), PYTHONHASHSEED=hash_seed)
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
        for file in FILES:
            assert (out / file).read_bytes() == (NANO / "e2e" / file).read_bytes(), file


def test_seed_changes_the_data():
    assert make_e2e.make_splits(1) != make_e2e.make_splits(0)


def test_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--out", str(tmp_path / "file"))
    assert done.returncode == 2
    assert "error: cannot write to" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "file, n_mrs, n_refs", [(FILES[0], 480, {4, 5}), (FILES[1], 60, {5, 6}), (FILES[2], 70, {5, 6})]
)
def test_counts_and_grouping(file, n_mrs, n_refs):
    groups = [(mr, [ref for _, ref in g]) for mr, g in groupby(rows(file), key=lambda r: r[0])]
    assert len(groups) == len({mr for mr, _ in groups}) == n_mrs  # rows of an MR are consecutive
    assert {len(refs) for _, refs in groups} == n_refs
    assert all(len(set(refs)) == len(refs) for _, refs in groups)


def test_no_mr_is_in_two_files():
    train, dev, test = ({mr for mr, _ in rows(file)} for file in FILES)
    assert not (train & dev or train & test or dev & test)


def test_some_test_names_are_new_and_most_are_not():
    train = {parse_mr(mr)["name"] for mr, _ in rows(FILES[0])}
    test = [parse_mr(mr)["name"] for mr in {mr for mr, _ in rows(FILES[2])}]
    assert 0.03 < sum(name not in train for name in test) / len(test) < 0.33


def test_mrs_have_the_official_form():
    order = ["name", "eatType", "food", "priceRange", "customer rating", "area"]
    order += ["familyFriendly", "near"]
    seen = set()
    for file in FILES:
        for text, _ in rows(file):
            mr = parse_mr(text)
            assert make_e2e.format_mr(mr) == text
            assert list(mr) == [a for a in order if a in mr] and "name" in mr
            assert 3 <= len(mr) <= 8
            seen |= set(mr.items())
    assert {a for a, _ in seen} == set(order)
    closed = {(a, v) for a, vs in make_e2e.VALUES.items() for v in vs if a not in ("name", "near")}
    assert closed <= seen  # every value of the closed attributes occurs


def test_every_reference_says_each_attribute_exactly_once():
    for mr, ref in REFS:
        assert read(ref) == sorted(mr.items()), ref
        assert ref.count(mr["name"]) == 1 and ref.count(mr.get("near", mr["name"])) == 1, ref


def test_the_grammar_does_so_beyond_the_committed_files():
    rng = random.Random(12)
    for _ in range(1500):
        mr = make_e2e.random_mr(rng)
        ref = make_e2e.realise(mr, rng)
        assert read(ref) == sorted(mr.items()), ref


def test_the_reader_would_notice_a_missing_and_a_repeated_attribute():
    mr = {"name": "Mirabel", "eatType": "pub", "food": "Thai", "priceRange": "cheap"}
    good = "Mirabel is a cheap Thai pub."
    assert read(good) == sorted(mr.items())
    assert read("Mirabel is a cheap pub.") != sorted(mr.items())
    assert read("Mirabel is a cheap Thai pub. It serves Thai food.") != sorted(mr.items())


def test_references_are_well_written():
    vowel_words, other_words = set(), set()
    for _, ref in REFS:
        assert "  " not in ref and ref == ref.strip() and not re.search(r" [.,]|,,|\.\.", ref), ref
        sentences = re.split(r"(?<=\.) ", ref)
        assert 1 <= len(sentences) <= 3, ref
        for sentence in sentences:
            assert sentence[0].isupper() and sentence.endswith(".") and len(sentence) > 8, ref
        assert not re.search(r"\b(\w+) \1\b", ref.lower()), ref  # no word twice in a row
        vowel_words |= set(re.findall(r"\b[Aa]n (\S+)", ref))
        other_words |= set(re.findall(r"\b[Aa] (\S+)", ref))
    # By sound these few differ from their spelling; the grammar is to keep clear of them.
    assert not any(re.match("(?i)uni|use|eu|one|hour|honest|8|11|18", w) for w in vowel_words)
    assert not any(re.match("(?i)uni|use|eu|one|hour|honest|8|11|18", w) for w in other_words)
    assert vowel_words and all(word[0].lower() in "aeiou" for word in vowel_words)
    assert other_words and all(word[0].lower() not in "aeiou" for word in other_words)


def test_lengths():
    lengths = [len(ref.split()) for _, ref in REFS]
    assert 5 <= min(lengths) and max(lengths) <= 50
    assert sum(10 <= n <= 40 for n in lengths) / len(lengths) > 0.9


def test_many_skeletons_with_a_common_core():
    """A skeleton is a reference whose phrases are replaced by the names of their attributes."""
    skeletons = [PHRASE.sub(lambda m: f"[{BOOK[m[0].lower()][0]}]", ref) for _, ref in REFS]
    assert len(set(skeletons)) > 700
    first = Counter(re.split(r"(?<=\.) ", skeleton)[0] for skeleton in skeletons)
    assert sum(count for _, count in first.most_common(50)) > 0.15 * len(REFS)


def test_pick_favours_the_first():
    rng = random.Random(0)
    counts = Counter(make_e2e.pick("abcd", rng) for _ in range(4000))
    assert [letter for letter, _ in counts.most_common()] == list("abcd")
    assert counts["a"] == pytest.approx(2000, rel=0.1)  # P(4 u^2 < 1) = 1/2


@pytest.mark.parametrize(
    "mr",
    [
        {"name": "Mirabel", "eatType": "pub"},
        {"eatType": "pub", "food": "Thai", "area": "riverside"},
        {"name": "Mirabel", "eatType": "pub", "area": "moon"},
        {"name": "Mirabel", "eatType": "pub", "colour": "red"},
    ],
)
def test_an_mr_the_grammar_cannot_say_is_refused(mr):
    with pytest.raises(ValueError, match="cannot describe"):
        make_e2e.realise(mr, random.Random(0))
