"""The embedded GLUE-format data sets (nano/make_glue.py): layout, labels, splits, no short cuts.

What a description says is read back from its text, so that labels are checked by another way than
the one by which they were made.

pytest tests/test_nano_glue.py
"""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import make_e2e
import make_glue
import numpy as np
import pytest
from test_nano_e2e import BOOK, PHRASE, read

NANO = Path(__file__).resolve().parent.parent / "nano"

TASKS, SPLITS = ("CoLA", "MRPC", "STS-B"), ("train", "dev")
FILES = [f"{task}/{split}.tsv" for task in TASKS for split in SPLITS]
MRPC_HEADER = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
STSB_HEADER = ["index", "genre", "filename", "year", "old_index", "source1", "source2",
               "sentence1", "sentence2", "score"]  # fmt: skip
WORD = re.compile(r"[^\s,.]+|[,.]")


@cache
def rows(file: str) -> list[list[str]]:
    """The rows of a committed file, less its header."""
    lines = (NANO / "glue" / file).read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""  # every line ends with \n
    return [line.split("\t") for line in (lines if file.startswith("CoLA") else lines[1:])]


@cache
def made() -> dict[str, list[make_glue.Example]]:
    return make_glue.make_files(0)


def columns(file: str) -> tuple[list[list[str]], np.ndarray]:
    """The texts of each row, and the (N,) labels or scores."""
    label, texts = {"CoLA": (1, [3]), "MRPC": (0, [3, 4]), "STS-B": (9, [7, 8])}[file.split("/")[0]]
    table = rows(file)
    return [[row[i] for i in texts] for row in table], np.array([float(r[label]) for r in table])


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(NANO / "make_glue.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_script_reproduces_the_committed_files(tmp_path):
    for hash_seed in ("1", "2"):  # the order of a set must not matter
        out = tmp_path / hash_seed
        done = run("--out", str(out), PYTHONHASHSEED=hash_seed)
        assert done.returncode == 0, done.stderr
        assert {str(p.relative_to(out)) for p in out.rglob("*.tsv")} == set(FILES)
        for file in FILES:
            assert (out / file).read_bytes() == (NANO / "glue" / file).read_bytes(), file


def test_seed_changes_the_data():
    assert make_glue.make_files(1) != made()


def test_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--out", str(tmp_path / "file"))
    assert done.returncode == 2
    assert "error: cannot write to" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------- layout


def test_sizes():
    assert sum((NANO / "glue" / file).stat().st_size for file in FILES) < 1.5e6
    for file in FILES:
        low, high = (1500, 2000) if "train" in file else (250, 350)
        assert low <= len(rows(file)) <= high
        assert len({tuple(texts) for texts in columns(file)[0]}) > 0.99 * len(rows(file))


@pytest.mark.parametrize("file", FILES)
def test_no_quotes_nor_stray_spaces(file):
    text = (NANO / "glue" / file).read_bytes().decode("utf-8")
    assert not re.search(r'["\r\ufeff]|  | [.,\t\n]|[\t\n] ', text)


@pytest.mark.parametrize("split", SPLITS)
def test_official_layout(split):
    for row in rows(f"CoLA/{split}.tsv"):
        assert len(row) == 4 and tuple(row[1:3]) in {("1", ""), ("0", "*")}
    first = {
        task: (NANO / f"glue/{task}/{split}.tsv").read_text("utf-8").split("\n")[0].split("\t")
        for task in TASKS
    }
    assert len(first["CoLA"]) == 4 and first["CoLA"][1] in "01"  # no header
    assert first["MRPC"] == MRPC_HEADER and first["STS-B"] == STSB_HEADER
    mrpc, stsb = rows(f"MRPC/{split}.tsv"), rows(f"STS-B/{split}.tsv")
    assert all(len(row) == 5 and row[0] in {"0", "1"} for row in mrpc)
    ids = [int(i) for row in mrpc for i in row[1:3]]
    assert len(set(ids)) == len(ids)
    assert all(len(row) == 10 and re.fullmatch(r"[0-4]\.\d{3}|5\.000", row[9]) for row in stsb)
    assert [int(row[0]) for row in stsb] == list(range(len(stsb)))


# ------------------------------------------------------------------------------------------- labels


def pairs(text: str) -> set[tuple[str, str]]:
    """The neighbours in a text in which every intact phrase is replaced by its attribute."""
    words = WORD.findall(PHRASE.sub(lambda m: BOOK[m[0].lower()][0].replace(" ", "_"), text))
    return set(zip(words, words[1:], strict=False))


@cache
def known_pairs() -> set[tuple[str, str]]:
    """All that 20,000 descriptions have."""
    rng = random.Random(99)
    texts = (make_e2e.realise(make_e2e.random_mr(rng), rng) for _ in range(20_000))
    return set().union(*map(pairs, texts))


@pytest.mark.parametrize("split", SPLITS)
def test_cola_scrambled_has_neighbours_that_the_grammar_never_has(split):
    for (text,), label in zip(*columns(f"CoLA/{split}.tsv"), strict=True):
        assert (pairs(text) <= known_pairs()) == label, text


def test_so_it_is_with_other_seeds():
    rng = random.Random(5)
    for _ in range(3000):
        _, (_, label, _, text) = make_glue.cola(0, rng)
        assert (pairs(text) <= known_pairs()) == (label == "1"), text


def test_cola_passes_over_what_cannot_be_scrambled(monkeypatch):
    for seed in range(20):  # whatever the label
        texts = iter(["Tansy serves Thai food.", "Tansy is a pub."])
        monkeypatch.setattr(make_glue, "realise", lambda mr, rng, texts=texts: next(texts))
        _, row = make_glue.cola(0, random.Random(seed))
        assert row[3] in {"Tansy is a pub.", "Tansy a is pub.", "Tansy is pub a."}


def test_scramble_keeps_words_sentences_and_names():
    rng = random.Random(5)
    for _ in range(1000):
        text = make_e2e.realise(make_e2e.random_mr(rng), rng)
        wrong = make_glue.scramble(text, rng)
        assert sorted(WORD.findall(wrong)) == sorted(WORD.findall(text))
        assert [len(s) for s in wrong.split(". ")] == [len(s) for s in text.split(". ")]
        for name in set(make_e2e.NAMES + make_e2e.LANDMARKS):
            assert (name in text) == (name in wrong)


def said(text: str) -> dict[str, str]:
    """The MR read back from a description."""
    meaning = dict(read(text))
    assert len(meaning) == len(read(text))
    return meaning


def at_odds(attribute: str, value: str, other: str) -> bool:
    """Whether no restaurant can have both: our own table, good, middling and bad in a column."""
    for scales in (
        ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
        ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    ):
        if attribute in ("priceRange", "customer rating") and {value, other} <= set(scales):
            return scales.index(value) % 3 != scales.index(other) % 3
    return value != other


@pytest.mark.parametrize("split", SPLITS)
def test_mrpc_labels(split):
    differing = Counter()
    for (one, two), label in zip(*columns(f"MRPC/{split}.tsv"), strict=True):
        a, b = said(one), said(two)
        changed = [k for k in a if a[k] != b[k]]
        assert a.keys() == b.keys() and one != two
        assert not changed if label else len(changed) >= len(a) / 2, (one, two)
        assert all(at_odds(k, a[k], b[k]) for k in changed)
        differing.update(changed)
    assert differing.keys() == make_e2e.VALUES.keys()


@pytest.mark.parametrize("split", SPLITS)
def test_stsb_scores(split):
    for (one, two), score in zip(*columns(f"STS-B/{split}.tsv"), strict=True):
        a, b = said(one), said(two)
        shared = sum(a.get(k) == b.get(k) for k in a.keys() | b.keys())
        assert score == pytest.approx(5 * shared / len(a.keys() | b.keys()), abs=5.1e-4)
        assert all(a[k] == b[k] or at_odds(k, a[k], b[k]) for k in a.keys() & b.keys())
        assert one != two


# ---------------------------------------------------------------------------------- splits, balance


def test_examples_hold_the_mrs_of_their_texts():
    for file, examples in made().items():
        assert [row for _, row in examples] == rows(file)
        for (mrs, _), texts, label in zip(examples, *columns(file), strict=True):
            if file.startswith("CoLA") and not label:  # its phrases may be broken, its names not
                assert mrs[0]["name"] in texts[0] and mrs[0].get("near", "") in texts[0]
            else:
                assert mrs[0] == said(texts[0]) and mrs[-1] == said(texts[-1])


def test_no_mr_is_in_train_and_dev():
    described = {split: set() for split in SPLITS}
    for file, examples in made().items():
        split = file.split("/")[1].removesuffix(".tsv")
        described[split] |= {frozenset(mr.items()) for mrs, _ in examples for mr in mrs}
    assert not described["train"] & described["dev"]
    names = {split: {dict(mr)["name"] for mr in described[split]} for split in SPLITS}
    assert not names["train"] & set(make_e2e.UNSEEN_NAMES)
    assert names["dev"] == set(make_e2e.NAMES)


@pytest.mark.parametrize("split", SPLITS)
def test_balance(split):
    assert 0.4 < 1 - columns(f"CoLA/{split}.tsv")[1].mean() < 0.5
    assert 0.45 < columns(f"MRPC/{split}.tsv")[1].mean() < 0.55
    scores = columns(f"STS-B/{split}.tsv")[1]
    assert scores.min() == 0 and scores.max() == 5
    assert all(0.15 < share / len(scores) < 0.25 for share in np.histogram(scores, 5, (0, 5))[0])


# --------------------------------------------------------------------------------------- short cuts


def features(texts: list[str], vocabulary: list[str]) -> np.ndarray:
    """(N, V + 3): how often a text has each word; how many words and characters it has; 1."""
    bags = [Counter(WORD.findall(text)) for text in texts]
    length = [[bag.total() / 10, len(text) / 50, 1] for bag, text in zip(bags, texts, strict=True)]
    return np.hstack([[[bag[word] for word in vocabulary] for bag in bags], length])


def dev_predictions(task: str, which: int) -> tuple[np.ndarray, np.ndarray]:
    """What ridge regression on a bag of words of one text alone predicts of dev; the truth."""
    (train, y), (dev, truth) = (columns(f"{task}/{split}.tsv") for split in SPLITS)
    train, dev = [t[which] for t in train], [t[which] for t in dev]
    vocabulary = sorted({word for text in train for word in WORD.findall(text)})
    X, mean = features(train, vocabulary), y.mean()
    weights = np.linalg.solve(X.T @ X + 10 * np.eye(X.shape[1]), X.T @ (y - mean))
    return features(dev, vocabulary) @ weights + mean, truth


@pytest.mark.parametrize("task, which", [("CoLA", 0), ("MRPC", 0), ("MRPC", 1)])
def test_label_is_not_in_the_words_of_one_text(task, which):
    predicted, truth = dev_predictions(task, which)
    majority = max(truth.mean(), 1 - truth.mean())
    assert ((predicted > 0.5) == truth).mean() < majority + 0.06  # two standard errors
    assert abs(np.corrcoef(predicted, truth)[0, 1]) < 0.15


@pytest.mark.parametrize("which", [0, 1])
def test_score_is_not_in_the_words_of_one_text(which):
    assert abs(np.corrcoef(*dev_predictions("STS-B", which))[0, 1]) < 0.15


def test_label_is_not_in_the_lengths():
    for task in ("CoLA", "MRPC"):
        texts, label = columns(f"{task}/train.tsv")
        lengths = np.array([[len(WORD.findall(text)) for text in pair] for pair in texts])
        for measure in (lengths[:, 0], lengths[:, -1], abs(lengths[:, 0] - lengths[:, -1])):
            if measure.any():  # CoLA has no second text to differ from
                assert abs(np.corrcoef(measure, label)[0, 1]) < 0.15
