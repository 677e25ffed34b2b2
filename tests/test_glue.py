"""Tests of GLUE: Table 5, the official files, examples, losses, metrics, and whole runs.

Runs train a RoBERTa of three layers and random weights on files of a few rows, in a folder called
roberta-base, so that the paper's settings and numbers apply to it.

pytest tests/test_glue.py
"""

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, need_shared, run_main, tiny
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from tokenizers import Tokenizer as BPE
from tokenizers import models, pre_tokenizers, trainers
from transformers import RobertaTokenizer

import eval as evaluation
import support.settings
import train
from data import (
    GLUE,
    TASKS,
    Example,
    GlueTask,
    Tokenizer,
    collate,
    encode_glue,
    encode_texts,
    read_glue,
)
from lora import loras, trained_tensors
from model import Config, load
from support.files import InputError
from support.runs import RunFolder
from support.settings import Settings
from train import parse, prepare

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------- the official files

# The columns of the official files, those of the texts marked by <> and that of the label by [].
LAYOUT = {
    "mnli": ("MNLI", "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|"
             "sentence1_parse|sentence2_parse|<sentence1>|<sentence2>|label1|[gold_label]"),
    "sst2": ("SST-2", "<sentence>|[label]"),
    "mrpc": ("MRPC", "[Quality]|#1 ID|#2 ID|<#1 String>|<#2 String>"),
    "cola": ("CoLA", "source|[label]|star|<sentence>"),
    "qnli": ("QNLI", "index|<question>|<sentence>|[label]"),
    "qqp": ("QQP", "id|qid1|qid2|<question1>|<question2>|[is_duplicate]"),
    "rte": ("RTE", "index|<sentence1>|<sentence2>|[label]"),
    "stsb": ("STS-B", "index|genre|filename|year|old_index|source1|source2|<sentence1>|<sentence2>|"
             "[score]"),
}  # fmt: skip
LABELS = {  # in the order in which the hub's data set numbers them
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "stsb": ["0.000", "3.8", "5", "5.000", "2.25"],
}
DEV = {"mnli": ["dev_matched", "dev_mismatched"]}
METRIC = {"cola": "matthews", "stsb": "pearson"}


def labels(task: str) -> list[str]:
    return LABELS.get(task, ["0", "1"])


def write_official(folder: Path, task: str, split: str, rows, end="\n", start="") -> Path:
    """Rows of (texts, label) as the official file has them."""
    name, columns = LAYOUT[task]
    if split.startswith("dev_"):  # of MNLI, with five annotators
        columns = columns.replace("label1", "label1|label2|label3|label4|label5")
    columns = columns.split("|")
    lines = [] if task == "cola" else ["\t".join(c.strip("<>[]") for c in columns)]
    for i, (texts, label) in enumerate(rows):
        left = [*texts]
        cells = [
            label if c[0] == "[" else left.pop(0) if c[0] == "<" else f"{c} {i}" for c in columns
        ]
        lines.append("\t".join(cells))
    path = folder / name / f"{split}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + "".join(line + end for line in lines)).encode())
    return path


WORDS = """the a pub near river serves cheap Italian food is it not kid friendly and rated "good"
it's café £20-25 coffee shop ... expensive place by city centre , who eats there ? 1987""".split()


def random_rows(task: str, count: int, seed: int) -> list[tuple[tuple[str, ...], str]]:
    """Labels in turn, and texts in which the label's number is the number of exclamation marks."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        label = labels(task)[i % len(labels(task))]
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in GLUE[task].texts]
        texts[-1] += " !" * (i % len(labels(task)))
        rows.append((tuple(texts), label))
    return rows


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """All eight tasks: 20 rows to train on, 11 in each dev set."""
    folder = tmp_path_factory.mktemp("glue")
    for i, task in enumerate(LAYOUT):
        write_official(folder, task, "train", random_rows(task, 20, seed=i))
        for j, split in enumerate(DEV.get(task, ["dev"])):
            write_official(folder, task, split, random_rows(task, 11, seed=10 * i + 100 + j))
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """A checkpoint of random weights with a byte-level BPE of its own."""
    folder = tmp_path_factory.mktemp("models") / "tiny/roberta-base"
    folder.mkdir(parents=True)
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    bpe.train_from_iterator([" ".join(rng.choices(WORDS, k=20)) for _ in range(99)], trainer)
    tiny("roberta", vocab_size=bpe.get_vocab_size()).save_pretrained(folder)
    bpe.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer(roberta) -> Tokenizer:
    return Tokenizer.load(roberta, Config.load(roberta))


# ------------------------------------------------------------------------------------------ Table 5

# As the paper prints it: MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B, or one cell for all.
TABLE_5 = {
    "roberta-base": {
        "Warmup Ratio": "0.06",
        "Batch Size": "16 16 16 32 32 16 32 16",
        "# Epochs": "30 60 30 80 25 25 80 40",
        "Learning Rate": "5E-04 5E-04 4E-04 4E-04 4E-04 5E-04 5E-04 4E-04",
        "LoRA Config. r_q = r_v": "8",
        "LoRA alpha": "8",
        "Max Seq. Len.": "512",
        "Gate Type": "Cos-Sig Cos Linear Linear Cos Cos-Sig Linear Linear",
        "Projection Dim": "416 128 - - 96 384 - -",
        "Indv Gate": "× × × × × × ✓ ✓",
        "Batch Agg": "Mode Mode Mode Mode Mean Mode Mean Mean",
        "Mixing Weights": "Learn Learn Learn Fix Learn Learn Fix Fix",
        "Load Balance": "0.005 0.01 0.0 0.01 0.001 0.001 0.001 0.006",
    },
    "roberta-large": {
        "Warmup Ratio": "0.06",
        "Batch Size": "4 4 4 4 4 4 8 8",
        "# Epochs": "10 10 20 20 10 20 20 30",
        "Learning Rate": "3E-04 4E-04 3E-04 2E-04 2E-04 3E-04 4E-04 2E-04",
        "LoRA Config. r_q = r_v": "8",
        "LoRA alpha": "16",
        "Max Seq. Len.": "128 128 512 128 512 512 512 512",
        "Gate Type": "Cos Cos Linear Linear Cos Cos-Sig Linear Linear",
        "Projection Dim": "416 64 - - 256 384 - -",
        "Indv Gate": "× × ✓ × × × ✓ ✓",
        "Batch Agg": "Mode Mode Mode Mode Mean Mode Mode Mode",
        "Mixing Weights": "Fix Fix Fix Fix Fix Learn Fix Fix",
        "Load Balance": "0.0001 0.0 0.0001 0.01 0.001 0.001 0.0 0.0",
    },
}


def as_printed(s: Settings) -> dict[str, str]:
    """Our settings in the paper's words."""
    linear = s.molex.gate == "linear"
    return {
        "Warmup Ratio": f"{s.warmup}",
        "Batch Size": f"{s.batch_size}",
        "# Epochs": f"{s.epochs}",
        "Learning Rate": f"{s.lr:.0E}",
        "LoRA Config. r_q = r_v": f"{s.lora_r}",
        "LoRA alpha": f"{s.lora_alpha:g}",
        "Max Seq. Len.": f"{s.max_length}",
        "Gate Type": ("Linear" if linear else "Cos") + "-Sig" * (s.molex.activation == "sigmoid"),
        "Projection Dim": "-" if linear else f"{s.molex.proj_dim}",
        "Indv Gate": "✓" if s.molex.individual_gates else "×",
        "Batch Agg": s.molex.vote.title(),
        "Mixing Weights": "Learn" if s.molex.learn_alpha else "Fix",
        "Load Balance": f"{s.load_balance}",
    }


@pytest.fixture
def hub(monkeypatch, tmp_path) -> None:
    """The hub, as far as the command line needs it."""
    large = dict(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16)
    configs = {"roberta-base": {}, "FacebookAI/roberta-base": {}, "roberta-large": large}
    configs |= {"my/copy": large, "distilroberta-base": dict(num_hidden_layers=6)}
    base = dict(model_type="roberta", vocab_size=50265, hidden_size=768, num_hidden_layers=12,
                num_attention_heads=12, intermediate_size=3072, max_position_embeddings=514,
                layer_norm_eps=1e-5)  # fmt: skip

    def snapshot_download(name, **_):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**base, **configs[name]}))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def settings(model: str | Path, task: str, flags: str = "", molex: bool = True) -> Settings:
    method = "" if molex else "--no-molex"
    return parse(f"--model {model} --task {task} {flags} {method}".split())[1][0]


@pytest.mark.parametrize("model", TABLE_5)
@pytest.mark.parametrize("place, task", [*enumerate(LAYOUT)])
def test_settings_are_table_5(hub, model, place, task):
    s = settings(model, task)
    cells = {row: text.split() for row, text in TABLE_5[model].items()}
    assert as_printed(s) == {row: c[place % len(c)] for row, c in cells.items()}
    # appendix B.1: the gate's AdamW, alpha where it is fixed; section 2.2: K, all layers mix
    assert (s.gate_lr, s.gate_weight_decay) == (0.1, 0.01)
    assert (s.molex.alpha, s.molex.top_k, s.molex.layers) == (0.95, 1, None)
    assert s.data is None and s.tune == "lora" and s.name == f"{model}-{task}-molex-s0"
    assert settings(model, task, molex=False) == replace(s, molex=None)


def test_the_column_goes_by_the_models_shape_whatever_its_folder_is_called(hub):
    for task in LAYOUT:
        base, large = (settings(model, task) for model in TABLE_5)
        assert settings("FacebookAI/roberta-base", task) == replace(
            base, model="FacebookAI/roberta-base"
        )
        assert settings("my/copy", task) == replace(large, model="my/copy")
        assert settings("my/copy", task).name == f"my-copy-{task}-molex-s0"
        for name, dropout in (("distilroberta-base", 0.1), ("nano/gpt2", 0.0)):
            s = settings(name, task)  # neither has a column: RoBERTa-base's, and its own dropout
            assert s == replace(base, model=name, dropout=dropout, shape=s.shape)
            assert s.shape == ("nano/gpt2" if name == "nano/gpt2" else "")


@pytest.mark.parametrize(
    "model, flags, borrowed",
    [
        ("distilroberta-base", "--task rte", "Table 5, for RoBERTa-base"),
        ("nano/gpt2", "--task rte", "Table 5, for RoBERTa-base"),
        ("my/copy", "--task rte", None),
        ("nano/roberta", "--task mrpc", None),
        ("nano/gpt2", "--task e2e", None),
    ],
)
def test_a_model_that_has_no_settings_says_whose_it_was_given(
    hub, monkeypatch, capsys, model, flags, borrowed
):
    monkeypatch.setattr(train, "run", mock.Mock(side_effect=InputError("not in this test")))
    with pytest.raises(InputError, match="not in this test"):
        run_main(f"--model {model} {flags} --no-molex")
    out = capsys.readouterr().out
    assert f"{model} is given the settings of {borrowed}" in out if borrowed else not out


def test_a_flag_goes_before_the_paper(hub):
    s = settings("roberta-base", "qnli", "--epochs 3 --lr 0.5 --gate linear --vote mode")
    changed = dict(epochs=3, lr=0.5, molex=replace(s.molex, gate="linear", vote="mode"))
    differs = dict(epochs=[3, 25], lr=[0.5, 4e-4], gate=["linear", "cosine"], vote=["mode", "mean"])
    assert s == replace(settings("roberta-base", "qnli"), **changed, differs=differs)
    lora = settings("roberta-base", "qnli", "--epochs 3 --gate linear", molex=False)
    assert lora.differs == dict(epochs=[3, 25])  # it has no gate


def test_all_tasks_and_methods(hub):
    runs = parse("--model roberta-base --task glue --compare --seeds 1 2".split())[1]
    assert [(s.task, s.seed, bool(s.molex)) for s in runs] == [
        (task, seed, molex) for task in LAYOUT for seed in (1, 2) for molex in (False, True)
    ]
    assert len({s.name for s in runs}) == 32
    names = {
        settings("roberta-base", "rte", f"--tune {t}", m).name
        for t in ("lora", "full", "bitfit")
        for m in (True, False)
    }
    assert len(names) == 6


# ------------------------------------------------------------------------------------------ readers

TRICKY = [
    'He said "yes', '"', "''quoted'' \"twice\"", "a\u0085b\u2028c\u2029d\x1ce\x0bf", " spaces  ",
    "</s> <s>", "café £20", "a, b; c",
]  # fmt: skip


@pytest.mark.parametrize("end, start", [("\n", ""), ("\r\n", "\ufeff")])
@pytest.mark.parametrize("task", LAYOUT)
def test_read_the_official_layout(tmp_path, task, end, start):
    n = len(GLUE[task].texts)
    rows, expected = [], []
    for i, text in enumerate(TRICKY):
        texts = (text, TRICKY[-1 - i])[:n]
        label = labels(task)[i % len(labels(task))]
        rows.append((texts, label))
        number = float(label) if task == "stsb" else labels(task).index(label)
        expected.append((texts, number))
    for split in ("train", *DEV.get(task, ["dev"])):
        write_official(tmp_path, task, split, rows, end, start)
        found = read_glue(tmp_path, task, split)
        assert found == expected
        assert {type(y) for _, y in found} == {float if task == "stsb" else int}
        rows, expected = rows[1:], expected[1:]  # each split is a file of its own


HUB_COLUMNS = {
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
}


@pytest.mark.parametrize("task", LAYOUT)
def test_read_from_the_hub(monkeypatch, task):
    asked = []
    columns = HUB_COLUMNS.get(task, ["sentence"])
    table = {name: [f"{name} {i}" for i in range(3)] for name in columns}
    numbers = [2.5, 0.0, 5.0] if task == "stsb" else [1, 0, 1]
    table |= {"label": numbers, "idx": [0, 1, 2]}

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict(table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ("train", *GLUE[task].dev):
        rows = read_glue(None, task, split)
        assert rows == [(tuple(f"{c} {i}" for c in columns), numbers[i]) for i in range(3)]
        assert {type(y) for _, y in rows} == {float if task == "stsb" else int}
    splits = ["train", "validation"]
    if task == "mnli":
        splits = ["train", "validation_matched", "validation_mismatched"]
    assert asked == [(("nyu-mll/glue", task), dict(split=split)) for split in splits]


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=OSError("no\nroute")))
    with pytest.raises(InputError, match=r"nyu-mll/glue cannot be fetched \(no\).*--data DIR$"):
        read_glue(None, "rte", "dev")


@pytest.mark.parametrize(
    "task, split, content, message",
    [
        ("rte", "dev", "", "dev.tsv is empty"),
        ("rte", "dev", "index\tsentence1\tsentence2\tlabel\n", "holds no examples"),
        ("rte", "dev", "index\tsentence1\tsentence2\n0\ta\tb\n", "has no column label"),
        ("mrpc", "dev", "Quality\ts1\ts2\n1\ta\tb\n", "has no column #. String and no column #"),
        ("rte", "dev", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\n",
         "line 3: 3 columns, not 4"),
        ("rte", "dev", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n",
         "line 2: label 'neutral' is not one of entailment, not_entailment"),
        ("cola", "dev", "x\t1\t\ta\nx\t2\t\tb\n", "line 2: label '2' is not one of 0, 1"),
        ("cola", "dev", "x\t1\t\ta\nx\t1\tb\n", "line 2: 3 columns, not 4"),
        ("cola", "dev", "x\t1\t\ta\nx\t1\t\tb\tc\n", "line 2: 5 columns, not 4"),  # a tab in a text
        ("sst2", "dev", "sentence\tlabel\na\t\n", "line 2: label ''"),
        ("sst2", "dev", "sentence\tlabel\ncafé\t1\n".encode("latin-1"), "not UTF-8"),
        *(("stsb", "dev", f"sentence1\tsentence2\tscore\na\tb\t1.5\na\tb\t{score}\n",
           f"line 3: score '{score}' is not a number from 0 to 5")
          for score in ("5.001", "6", "-1", "-0.5", "nan", "inf", "", "1e9", "high")),
        ("qqp", "dev", "question1\tquestion2\tis_duplicate\na\tb\n", "holds no examples"),
    ],
)  # fmt: skip
def test_read_what_cannot_be_read(tmp_path, task, split, content, message):
    path = tmp_path / LAYOUT[task][0] / f"{split}.tsv"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_glue(tmp_path, task, split)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_read_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="MNLI/dev_matched.tsv is missing; --data DIR must"):
        read_glue(tmp_path, "mnli", "dev_matched")


def test_broken_rows_of_qqp_are_left_out_and_counted(tmp_path, capsys):
    rows = random_rows("qqp", 4, 0)
    path = write_official(tmp_path, "qqp", "train", rows)
    whole = read_glue(tmp_path, "qqp", "train")
    assert capsys.readouterr().out == ""
    lines = path.read_text().split("\n")
    lines[2:2] = ["7\t1\t2\tcut off", "rest of it\t1"]
    path.write_text("\n".join(lines))
    assert read_glue(tmp_path, "qqp", "train") == whole
    assert re.search(r"QQP/train.tsv: left out 2 rows", capsys.readouterr().out)


@pytest.mark.parametrize(
    "task, low, high",
    [("cola", 0.6, 0.75), ("sst2", 0.5, 0.6), ("mrpc", 0.6, 0.7), ("rte", 0.45, 0.55),
     ("stsb", 2.0, 3.0)],
)  # fmt: skip
def test_read_real_data(task, low, high):
    """Share of the label 1, or mean score."""
    folder = need_shared("data/glue")
    for split in ("train", "dev"):
        rows = read_glue(folder, task, split)
        lines = (folder / LAYOUT[task][0] / f"{split}.tsv").read_bytes().count(b"\n")
        assert len(rows) == lines - (task != "cola")
        scores = [y for _, y in rows]
        assert low < np.mean(scores) < high
        assert (min(scores), max(scores)) == ((0, 5) if task == "stsb" else (0, 1))
        assert all(text.strip() for texts, _ in rows for text in texts)


# ----------------------------------------------------------------------------------------- encoding


def test_encoding_equals_transformers(roberta, tokenizer):
    """Where a pair is cut to two halves of unlike size, transformers' new tokenizers may give the
    odd token to the second text; its older ones, and we, always give it to the first."""
    reference = RobertaTokenizer.from_pretrained(roberta)
    rng, odd = random.Random(1), 0
    texts = [row[0][0] for row in random_rows("sst2", 60, 1)] + [TRICKY[0], "", " a"]
    for limit in (6, 11, 16, 64):
        for text in texts:
            expected = reference([text], truncation="longest_first", max_length=limit).input_ids
            assert [encode_texts(tokenizer, (text,), limit)] == expected
            pair = (text, rng.choice(texts))
            ours = encode_texts(tokenizer, pair, limit)
            cut = reference([pair], truncation="longest_first", max_length=limit)
            (theirs,) = cut.input_ids
            if ours != theirs:
                odd += 1
                room = limit - 4
                assert room % 2 and len(ours) == len(theirs) == limit
                a, b = (tokenizer.encode(text) for text in pair)
                assert room // 2 < len(a) <= len(b)
                assert ours == [0, *a[: room // 2 + 1], 2, 2, *b[: room // 2], 2]
                assert theirs == [0, *a[: room // 2], 2, 2, *b[: room // 2 + 1], 2]
    assert odd < 60  # of 252


def test_text_is_not_mistaken_for_tokens(tokenizer):
    texts = ("a </s><s> b", "<pad>")
    ids = encode_texts(tokenizer, texts, 64)
    assert [i for i in ids if i < 5] == [0, 2, 2, 2]
    middle = ids.index(2)
    assert tokenizer.decode(ids[:middle]) == texts[0]
    assert tokenizer.decode(ids[middle:]) == texts[1]


def test_a_decoder_ends_with_its_end_of_text():
    gpt2 = Tokenizer.load(ROOT / "nano/gpt2", Config.load(ROOT / "nano/gpt2"))
    a, b, end = gpt2.encode("a cheap pub"), gpt2.encode("by the river"), [gpt2.eos]
    assert encode_texts(gpt2, ("a cheap pub",), 64) == a + end
    assert encode_texts(gpt2, ("a cheap pub", "by the river"), 64) == a + end + b + end
    cut = encode_texts(gpt2, ("a cheap pub", "by the river"), 5)
    assert len(cut) == 5 and cut[-1] == cut[-1 - (5 - 2) // 2 - 1] == gpt2.eos


def test_too_small_a_limit(tokenizer):
    assert len(encode_texts(tokenizer, ("a b c", "a b c"), 6)) == 6
    with pytest.raises(InputError, match="2 texts do not fit into 5 tokens; raise --max-length"):
        encode_texts(tokenizer, ("a b c", "a b c"), 5)


# --------------------------------------------------------------------------------- batches and loss


def test_collate_labels():
    batch = collate([Example([5, 6], label=2), Example([4], label=0)])
    assert batch.ids.tolist() == [[5, 6], [4, 0]]
    assert batch.mask.tolist() == batch.prompt.tolist() == [[True, True], [True, False]]
    assert batch.where.tolist() == [0, 1] and batch.target.tolist() == [2, 0]
    assert batch.target.dtype == torch.long
    scores = collate([Example([5], label=0.0), Example([5, 4], label=4.25)])
    assert scores.target.tolist() == [0.0, 4.25] and scores.target.dtype == torch.float32


def some_examples(s: Settings, tokenizer: Tokenizer) -> list[Example]:
    examples = encode_glue(tokenizer, read_glue(s.data, s.task, "train"), 64)[:7]
    assert len({len(e) for e in examples}) > 3
    return examples


@pytest.mark.parametrize("task", ["mnli", "stsb"])
@pytest.mark.parametrize("decoder", [False, True])
def test_loss_is_the_mean_over_the_examples(roberta, glue, task, decoder):
    """One by one without padding gives what the padded batch does, whole or in three parts: the
    loss, the gradients, and the predictions. Every sequence chooses its own layers, so that they
    do not depend on the batch."""
    flags = f"--data {glue} --dropout 0 --route sequence --clip 0 --load-balance 0"
    flags += " --gate-weight straight-through"
    s = settings("nano/gpt2" if decoder else roberta, task, flags)
    model, tokenizer = prepare(s, CPU)
    examples = some_examples(s, tokenizer)
    trained = trained_tensors(model)
    start = {n: p.detach().clone() for n, p in trained.items()}
    losses, answers = [], []
    for e in examples:
        logits = model(torch.tensor([e.prompt]))
        target = torch.tensor([e.label])
        regression = task == "stsb"
        assert logits.shape == (1, 1 if regression else 3)
        losses.append(
            F.mse_loss(logits[0], target) if regression else F.cross_entropy(logits, target)
        )
        answers.append(logits[0, 0].item() if regression else logits.argmax().item())
    expected = sum(losses) / len(losses)
    wanted = dict(zip(trained, torch.autograd.grad(expected, [*trained.values()]), strict=True))
    for accumulate in (1, 3):
        optimizer = torch.optim.SGD(trained.values(), lr=1.0)  # a step is the gradient
        loss = train.train_step(model, optimizer, examples, replace(s, accumulate=accumulate))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        with torch.no_grad():
            for n, p in trained.items():
                torch.testing.assert_close(start[n] - p, wanted[n], atol=2e-5, rtol=1e-3, msg=n)
                p.copy_(start[n])
    found = evaluation.classify(model, examples, 3)
    assert model.training and found == pytest.approx(answers, abs=1e-4)


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_an_empty_share_of_a_batch_counts_for_nothing(roberta, glue, task):
    s = settings(roberta, task, f"--data {glue}")
    model, _ = prepare(s, CPU)
    loss = model.loss(collate([]))
    loss.backward()
    assert loss.item() == 0
    for name, p in trained_tensors(model).items():
        assert p.grad is None or not p.grad.count_nonzero(), name  # nor is it NaN


# ------------------------------------------------------------------------------------------ metrics


@pytest.mark.filterwarnings("ignore:A single label")
def test_metrics_equal_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 500):
        for _ in range(20):
            classes = rng.integers(0, 3, (2, n)).tolist()
            assert evaluation.accuracy(*classes) == pytest.approx(accuracy_score(*classes))
            binary = (rng.random((2, n)) < 0.3).astype(int).tolist()
            expected = matthews_corrcoef(*binary)
            assert evaluation.pearson(*binary) == pytest.approx(expected, abs=1e-9)
            scores = (rng.random((2, n)) * 5).tolist()
            expected = pearsonr(*scores).statistic
            assert evaluation.pearson(*scores) == pytest.approx(expected, abs=1e-9)
    for constant, other in [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [0, 0, 0]), ([1, 1], [1, 1])]:
        assert evaluation.pearson(constant, other) == matthews_corrcoef(constant, other) == 0
        assert evaluation.pearson([float(x) for x in constant], [float(y) for y in other]) == 0


def test_which_metric_a_task_has():
    for task in LAYOUT:
        dev = {"dev": [Example([1], label=y) for y in (0, 1, 1, 0, 1)]}
        scores = evaluation.glue_scores(task, {"dev": [0, 1, 0, 0, 1]}, dev)
        expected = dict(accuracy=0.8, matthews=2 / 3, pearson=2 / 3)
        name = METRIC.get(task, "accuracy")
        assert scores == {name: pytest.approx(expected[name])}


def test_mnlis_overall_accuracy_is_over_both_sets_together():
    found = {"dev_matched": [0, 0, 0, 0], "dev_mismatched": [1, 1]}
    dev = {
        "dev_matched": [Example([1], label=y) for y in (0, 1, 2, 1)],
        "dev_mismatched": [Example([1], label=y) for y in (1, 1)],
    }
    assert evaluation.glue_scores("mnli", found, dev) == dict(
        accuracy=0.5, accuracy_matched=0.25, accuracy_mismatched=1.0
    )


def test_a_task_of_ones_own_with_two_dev_sets(monkeypatch):
    names = dict(dev=("dev", "dev_hard"))
    monkeypatch.setitem(GLUE, "own", GlueTask("Own", ("a",), "label", ("0", "1"), **names))
    dev = {split: [Example([1], label=1)] * 4 for split in names["dev"]}
    scores = evaluation.glue_scores("own", {"dev": [1] * 4, "dev_hard": [0] * 4}, dev)
    assert scores == dict(accuracy=0.5, accuracy_dev=1.0, accuracy_hard=0.0)


# --------------------------------------------------------------------------------- runs, end to end


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def mnli(roberta, glue, tmp_path_factory) -> dict[bool, Path]:
    """Finished runs on MNLI without MoLEx and with it."""
    out = tmp_path_factory.mktemp("mnli")
    run_main(
        f"--model {roberta} --task mnli --data {glue} --compare --epochs 3 --lr 0.02"
        f" --gate-lr 0.01 --out {out}"
    )
    lora, molex = sorted(f for f in out.iterdir() if f.is_dir())
    return {False: lora, True: molex}


@pytest.mark.parametrize("molex", [False, True])
def test_scores_are_those_of_the_best_epoch(mnli, glue, molex):
    folder = mnli[molex]
    assert sorted(f.name for f in folder.iterdir()) == [
        "adapter.safetensors", "config.json", "last.pt", "loss.png", "metrics.jsonl", "origin.json",
        "predictions.tsv", *["routes.json"] * molex, "samples.txt", "scores.json",
    ]  # fmt: skip
    log, scores = log_of(folder), json.loads((folder / "scores.json").read_text())
    best = [e for e in log if e["accuracy"] == max(e["accuracy"] for e in log)][0]
    trainable = scores.pop("trainable")
    assert best.pop("curve")
    assert scores == best and len(log) == 3
    # r = 8 on q and v of 3 layers of width 32; a cosine gate of 416 and a learned alpha: no head
    gate = 416 * 32 + 3 * 416 + 1 + 1
    assert trainable == 3 * 2 * 8 * (32 + 32) + molex * gate
    assert folder.name == "tiny-roberta-base-mnli-" + ("molex-s0" if molex else "lora-s0")
    table = [line.split("\t") for line in (folder / "predictions.tsv").read_text().splitlines()]
    assert table.pop(0) == ["split", "index", "label", "prediction"]
    for split, key in [("dev_matched", "accuracy_matched"), ("", "accuracy")]:
        rows = [row for row in table if row[0] == split or not split]
        right = accuracy_score([row[2] for row in rows], [row[3] for row in rows])
        assert scores[key] == pytest.approx(right)
    dev = [read_glue(glue, "mnli", split) for split in DEV["mnli"]]
    assert [row[1:3] for row in table] == [
        [str(i), LABELS["mnli"][y]] for rows in dev for i, (_, y) in enumerate(rows)
    ]
    samples = (folder / "samples.txt").read_text()
    assert samples.count("output:") == samples.count("reference:") == 5
    assert dev[0][0][0][0] in samples


def test_evaluating_again_gives_the_same(mnli, tmp_path, capsys):
    """By eval.py, in batches of another process: to the last bit."""
    folder = tmp_path / "run"
    shutil.copytree(mnli[True], folder)
    before = (folder / "scores.json").read_text()
    (folder / "scores.json").unlink()
    call(evaluation, folder)
    assert (folder / "scores.json").read_text() == before and (folder / "routes.png").exists()
    scores = json.loads(before)
    titles = {"MNLI accuracy": "", "matched": "_matched", "mismatched": "_mismatched"}
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table == [[*t.split(), f"{100 * scores['accuracy' + n]:.2f}"] for t, n in titles.items()]


def test_training_and_evaluation_see_the_same_batches(roberta, glue, tmp_path, monkeypatch):
    """Under batch routing another batch is another prediction."""
    seen, collate = [], evaluation.collate
    monkeypatch.setattr(
        evaluation, "collate", lambda some: seen.append([e.prompt for e in some]) or collate(some)
    )
    step = train.train_step

    def train_step(*args):
        before, loss = len(seen), step(*args)
        del seen[before:]  # what is trained on
        return loss

    monkeypatch.setattr(train, "train_step", train_step)
    flags = f"--epochs 2 --eval-batch 4 --max-length 40 --data {glue}"
    run_main(f"--model {roberta} --task mnli --out {tmp_path} {flags}")
    first, second, last = (seen[i : i + 6] for i in (0, 6, 12))
    assert first == second == last and len(seen) == 18
    lengths = {len(ids) for batch in first for ids in batch}
    assert max(lengths) == 40 and len(lengths) > 5


def test_the_first_of_the_best_epochs_is_kept(roberta, glue, tmp_path, monkeypatch):
    results, after = iter([0.25, 0.75, 0.75, 0.5]), []

    def glue_scores(task, found, dev):
        return {"matthews": next(results)}

    step = train.train_step

    def train_step(model, *rest):
        loss = step(model, *rest)
        after.append({n: p.detach().clone() for n, p in trained_tensors(model).items()})
        return loss

    monkeypatch.setattr(evaluation, "glue_scores", glue_scores)
    monkeypatch.setattr(train, "train_step", train_step)
    s = settings(roberta, "cola", f"--data {glue} --epochs 4")  # one step an epoch
    train.train(s, tmp_path, CPU)
    kept = load_file(tmp_path / "adapter.safetensors")
    assert [same(kept, tensors) for tensors in after] == [False, True, False, False]
    assert RunFolder(tmp_path, "matthews").best_of(log_of(tmp_path))["epoch"] == 2


@pytest.mark.parametrize("task, molex", [("mrpc", True), ("stsb", False)])
def test_a_killed_run_resumes_bit_for_bit(roberta, glue, tmp_path, train_with_kills, task, molex):
    """Killed within an epoch and at its end, with dropout; 5 steps an epoch."""
    s = settings(roberta, task, f"--data {glue} --batch-size 4 --max-steps 13", molex)
    assert s.dropout == 0.1
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(s, whole, CPU)
    train_with_kills(s, killed)
    assert same(*(load_file(f / "adapter.safetensors") for f in (whole, killed)))
    states = [torch.load(f / "last.pt", weights_only=True) for f in (whole, killed)]
    assert same(*(state["tensors"] for state in states))
    one, other = ([dict(e, seconds_per_step=0) for e in log_of(f)] for f in (whole, killed))
    assert one == other and [e["step"] for e in one] == [5, 10, 13]


def test_a_learnable_task_is_learned(roberta, tmp_path):
    """From the official file to the score: full fine-tuning tells one exclamation mark from two."""
    rows = [(("no " + " !" * (1 + i % 2),), str(i % 2)) for i in range(64)]
    write_official(tmp_path, "sst2", "train", rows)
    write_official(tmp_path, "sst2", "dev", rows[:21])
    run_main(
        f"--model {roberta} --task sst2 --data {tmp_path} --out {tmp_path}/runs --no-molex"
        " --tune full --epochs 4 --lr 0.0005 --batch-size 4 --dropout 0"
    )
    (folder,) = (tmp_path / "runs").iterdir()
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["accuracy"] == 1
    body = load(roberta, head="none")
    assert scores["trainable"] == sum(p.numel() for p in body.parameters())


@pytest.mark.parametrize("molex", [True, False])
@pytest.mark.parametrize("tune", ["full", "bitfit", "lora"])
def test_what_is_trained(roberta, glue, tune, molex):
    """By name, and by what a step changes."""
    s = settings(roberta, "mrpc", f"--data {glue} --tune {tune} --load-balance 0.01", molex)
    model, tokenizer = prepare(s, CPU)
    named = dict(model.named_parameters())
    new = {n for n in named if n.startswith(("head.", "layers.gates.", "layers.alpha"))}
    assert len(new) == 4 + 3 * molex  # two layers in the head; a linear gate and alpha
    chosen = {
        "full": {*named},
        "bitfit": {n for n in named if n.endswith(".bias")} | new,
        "lora": {n for n in named if n.endswith((".q.A", ".q.B", ".v.A", ".v.B"))} | new,
    }[tune]
    assert trained_tensors(model).keys() == chosen
    assert len(loras(model)) == 6 * (tune == "lora")
    assert len(chosen - new) == {"full": 53, "bitfit": 25, "lora": 12}[tune]
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer, schedule = train.make_optimizer(model, s, 10)
    for _ in range(3):  # the first at rate 0; at the second A is still, as B is zero
        train.train_step(model, optimizer, some_examples(s, tokenizer), s)
        schedule.step()
    still = {n for n, p in named.items() if torch.equal(p, before[n])}
    assert not still - {n for n in named if n not in chosen or n.endswith("attn.k.bias")}
    assert {n for n in named if n not in chosen} <= still
    groups = [
        (g["weight_decay"], g["initial_lr"], len(g["params"])) for g in optimizer.param_groups
    ]
    gate = {(0.01, 0.1, 2), (0.0, 0.1, 1)} if molex else set()  # W and b; alpha, which stays
    assert sum(g[2] for g in groups) == len(chosen) and gate == {g for g in groups if g[1] == 0.1}


def test_no_weight_decay_on_biases_and_norms(roberta, glue):
    model, _ = prepare(settings(roberta, "cola", f"--data {glue} --tune full", False), CPU)
    groups = train.make_optimizer(model, settings(roberta, "cola"), 10)[0].param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {n for g in groups if g["weight_decay"] for n in (names[id(p)] for p in g["params"])}
    assert not [n for n in decayed if n.endswith("bias") or "norm" in n]
    assert len(decayed) == 3 + 3 * 6 + 2 and {g["weight_decay"] for g in groups} == {0.1, 0.0}


def test_task_glue_trains_all_eight(roberta, glue, tmp_path, capsys):
    run_main(f"--model {roberta} --task glue --data {glue} --epochs 1 --compare --out {tmp_path}")
    lines = capsys.readouterr().out.splitlines()
    assert not any("paper:" in line for line in lines)  # the paper has no such model
    assert len([*tmp_path.glob("*/")]) == 16
    found = []
    for task, (name, _) in LAYOUT.items():
        metric = METRIC.get(task, "accuracy")
        lora, molex = (
            json.loads((tmp_path / f"tiny-roberta-base-{task}-{m}-s0/scores.json").read_text())
            for m in ("lora", "molex")
        )
        found.append((name, 100 * lora[metric], 100 * molex[metric]))
    found.append(("average", *(sum(row[k] for row in found) / 8 for k in (1, 2))))
    for name, one, other in found:
        (line,) = [line for line in lines if line.startswith(name)]
        assert re.findall(r"-?\d+\.\d\d", line)[:2] == [f"{one:.2f}", f"{other:.2f}"]
    for part in ("matched", "mismatched"):
        assert any(line.split()[:1] == [part] for line in lines)


# As the paper prints them: LoRA, MoLEx; for MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B, Avg.
PAPER = {
    "roberta-base": (
        "87.5 ± .2, 95.0 ± .1, 88.7 ± .3, 62.8 ± 1.0, 93.2 ± .2, 90.8 ± .0, 76.9 ± 1.1, 90.8 ± .2,"
        " 85.7",
        "87.7 ± .2, 95.4 ± .2, 89.8 ± .2, 64.8 ± .5, 93.2 ± .2, 91.0 ± .0, 77.3 ± 1.3, 91.0 ± .2,"
        " 86.3",
    ),
    "roberta-large": (
        "90.7 ± .1, 96.3 ± .2, 90.9 ± .4, 67.8 ± 1.7, 94.8 ± .3, 91.5 ± .1, 86.5 ± .9, 91.9 ± .1,"
        " 88.8",
        "90.9 ± .1, 96.4 ± .2, 91.4 ± .7, 68.2 ± .2, 94.8 ± .0, 91.6 ± .1, 87.1 ± .9, 92.0 ± .2,"
        " 89.1",
    ),
}
FULL = {  # Table 11, in its own order
    "RTE": "80.1 80.9", "MRPC": "88.7 89.5", "STS-B": "90.9 91.1", "CoLA": "62.6 63.3",
    "MNLI": "87.7 87.8", "QNLI": "92.9 93.1", "SST-2": "95.0 95.1", "QQP": "91.8 91.8",
    "average": "86.2 86.6",
}  # fmt: skip
FROM_MNLI = {  # Table 9: the other five are those of Table 1
    "MRPC": "89.7 91.1",
    "RTE": "86.8 86.8",
    "STS-B": "91.3 91.3",
    "average": "87.1 87.6",
}


@pytest.mark.parametrize("which", ["roberta-base", "roberta-large", "full", "from MNLI", "bitfit"])
def test_the_table_shows_what_the_paper_has(
    hub, roberta, mnli, tmp_path, capsys, monkeypatch, which
):
    names = [name for name, _ in LAYOUT.values()] + ["average"]
    rows, flags = {}, f"--model {which}"
    if which in (*PAPER, "from MNLI"):
        table_1 = PAPER["roberta-base" if which == "from MNLI" else which]
        columns = [[c.strip() for c in column.split(", ")] for column in table_1]
        rows = {name: list(pair) for name, *pair in zip(names, *columns, strict=True)}
    if which in ("full", "bitfit"):
        rows = {name: pair.split() for name, pair in FULL.items() if which == "full"}
        flags = f"--model roberta-base --tune {which}"
    if which == "from MNLI":
        rows |= {name: pair.split() for name, pair in FROM_MNLI.items()}
        flags = f"--model {roberta} --init-from {mnli[False]} {mnli[True]}"
        monkeypatch.setitem(support.settings.PAPER["models"], "roberta-base", ["roberta", 3, 32])
    runs = parse(f"--task glue --compare {flags}".split())[1]
    for s in runs:
        (tmp_path / s.name).mkdir()
        scores = {METRIC.get(s.task, "accuracy"): 0.125, "trainable": 1, "seconds_per_step": 1}
        (tmp_path / s.name / "scores.json").write_text(json.dumps(scores))
    train.report(runs, tmp_path, TASKS)
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        (line,) = [line for line in lines if line.startswith(name)]
        left = line.split("+0.00")[1]
        cells = re.findall(r"\S+(?: ± \S+)?", left)
        if which == "from MNLI":  # whose deviations have lost their points
            cells = [cell.split()[0] for cell in cells]
            rows[name] = [cell.split()[0] for cell in rows[name]]
        assert cells == rows.get(name, [])


def test_whatever_is_not_the_papers_stands_below_its_numbers(hub, tmp_path, capsys):
    """A short run cannot pass for the paper's."""

    def report(flags: str, **counts: int) -> list[str]:
        runs = parse(f"--model roberta-base --task rte --compare {flags}".split())[1]
        for s in runs:
            (tmp_path / s.name).mkdir(exist_ok=True)
            scores = dict(accuracy=0.5, trainable=1, seconds_per_step=1, examples=counts)
            (tmp_path / s.name / "scores.json").write_text(json.dumps(scores))
        train.report(runs, tmp_path, TASKS)
        return capsys.readouterr().out.partition("Not as in the paper:")[2].split("\n  ")[1:]

    five = "--seeds 0 1 2 3 4"
    assert report(five, train=2490, dev=277) == []
    lines = report("--epochs 3 --max-steps 25 --vote mode", train=3367, dev=277)
    assert [line.strip() for line in lines] == [
        "RTE: epochs 3 (paper: 80)",
        "RTE: max steps 25 (paper: none)",
        "RTE: 3,367 train examples (official data: 2,490)",
        "RTE: vote mode (paper: mean)",
        "seeds: 1 (paper: 5)",
    ]
    assert report("--seeds 0 1", train=2490, dev=277)[0].strip() == "seeds: 2 (paper: 5)"


# -------------------------------------------------------------------------------------- --init-from


def prepared(roberta: Path, glue: Path, flags: str) -> tuple[Settings, dict[str, torch.Tensor]]:
    s = settings(roberta, "mrpc", f"--data {glue} {flags}")
    return s, trained_tensors(prepare(s, CPU)[0])


GATE_OF_MNLI = "--gate cosine --activation sigmoid --proj-dim 416"


@pytest.mark.parametrize("flags", ["", GATE_OF_MNLI])
def test_init_from_takes_the_lora_and_a_gate_of_the_same_shape_but_no_head(
    roberta, glue, mnli, capsys, flags
):
    """The settings are the task's own (Table 9, B.1); a gate of another kind is new, and it says
    so."""
    fresh, start = prepared(roberta, glue, flags)
    s, ours = prepared(roberta, glue, f"{flags} --init-from {mnli[False]} {mnli[True]}")
    theirs = load_file(mnli[True] / "adapter.safetensors")
    gate = {n for n in theirs if n.startswith(("layers.gates.", "layers.alpha"))}
    head = {n for n in theirs if n.startswith("head.")}
    taken = theirs.keys() - head - (set() if flags else gate)
    assert len(gate) == 4 and len(taken) == 12 + 4 * bool(flags)
    assert all(torch.equal(ours[n], theirs[n]) for n in taken)
    assert all(not torch.equal(start[n], theirs[n]) for n in taken)
    assert all(torch.equal(ours[n], start[n]) for n in ours.keys() - taken)  # alpha is gate's
    assert ours["head.out.weight"].shape == (2, 32) and theirs["head.out.weight"].shape == (3, 32)
    assert s == replace(fresh, init=str(mnli[True]))
    assert s.name == "tiny-roberta-base-mrpc-molex-init-s0"
    said = capsys.readouterr().out
    assert f"starts from {mnli[True]}: all but its head" in said
    assert ("and its gate, for want of one of this shape" in said) == (not flags)


@pytest.mark.parametrize("learns", [False, True])
def test_init_from_takes_the_gate_where_only_one_of_the_two_learns_alpha(
    roberta, glue, mnli, tmp_path, capsys, learns
):
    """The gate is of the same shape; alpha stays as it is or begins anew, which is said."""
    init = mnli[True]
    if learns:
        init = Path(shutil.copytree(mnli[True], tmp_path / "fixed"))
        tensors = load_file(init / "adapter.safetensors")
        del tensors["layers.alpha_logit"]
        save_file(tensors, init / "adapter.safetensors")
    flags = f"{GATE_OF_MNLI} --init-from {init} " + ("" if learns else "--no-learn-alpha")
    ours = prepared(roberta, glue, flags)[1]
    theirs = load_file(init / "adapter.safetensors")
    gate = [name for name in theirs if name.startswith("layers.gates.")]
    assert gate and all(torch.equal(ours[name], theirs[name]) for name in gate)
    assert ("layers.alpha_logit" in ours) == learns
    said = capsys.readouterr().out
    assert "all but its head and alpha, which only one of the two learns" in said


def test_table_9_is_one_command(hub, roberta, mnli):
    """Five tasks are ordinary runs, three start from MNLI's; each has its own column of Table 5."""
    flags = f"--model {roberta} --task glue --compare"
    ordinary = parse(flags.split())[1]
    runs = parse(f"{flags} --init-from {mnli[False]} {mnli[True]}".split())[1]
    for s, plain in zip(runs, ordinary, strict=True):
        init = str(mnli[bool(s.molex)]) if s.task in ("mrpc", "rte", "stsb") else None
        assert s == replace(plain, init=init)


def test_init_from_a_run_without_molex(roberta, glue, mnli, capsys):
    theirs = load_file(mnli[False] / "adapter.safetensors")
    fresh, start = prepared(roberta, glue, "")
    for flags in ("", "--no-molex"):
        s, ours = prepared(roberta, glue, f"{flags} --init-from {mnli[False]}")
        assert bool(s.molex) == (flags == "") and s.init == str(mnli[False])
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs if not n.startswith("head."))
        gate = {n for n in ours if n.startswith(("layers.gates", "layers.alpha"))}
        assert gate == {n for n in start if s.molex and n.startswith(("layers.g", "layers.alpha"))}
        assert s.molex in (None, fresh.molex)
        assert ("all but its head; it has no gate" in capsys.readouterr().out) == bool(s.molex)


def test_init_from_a_run_that_trained_everything(roberta, glue, tmp_path):
    """Their tune is taken over, and with it what is trained."""
    flags = f"--model {roberta} --data {glue} --no-molex"
    some = "--task rte --tune bitfit --epochs 1 --lr 0.1 --batch-size 5"
    run_main(f"{flags} {some} --out {tmp_path}")
    (source,) = tmp_path.iterdir()
    theirs = load_file(source / "adapter.safetensors")
    s, ours = prepared(roberta, glue, f"--no-molex --init-from {source}")
    assert s.tune == "bitfit" and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) != n.startswith("head.") for n in theirs)


def test_init_from_an_untied_language_models_run(checkpoint):
    """Its head is one of what was trained, not a new one for a task."""
    model = load(checkpoint("llama"))
    tensors = {n: p.detach() + 1 for n, p in model.named_parameters()}
    assert "head.weight" in tensors
    with mock.patch.object(train, "read_run", return_value=({}, tensors)):
        train.start_from(model, Path("nowhere"))
    assert all(torch.equal(p, tensors[n]) for n, p in model.named_parameters())


def test_a_run_with_init_from(roberta, glue, mnli, tmp_path, capsys):
    """Table 9: both methods go on from their own run."""
    flags = f"--model {roberta} --task rte --data {glue} --compare --epochs 1 --out {tmp_path}"
    run_main(f"{flags} --init-from {mnli[True]} {mnli[False]}")
    for name, source in (("lora-init", mnli[False]), ("molex-init", mnli[True])):
        (folder,) = tmp_path.glob(f"*{name}-s0")
        assert json.loads((folder / "config.json").read_text())["init"] == str(source)
        assert json.loads((folder / "scores.json").read_text())["epoch"] == 1
    run_main(f"{flags} --init-from {mnli[True]} {mnli[False]}")
    assert capsys.readouterr().out.count("finished before, kept") == 2


def loralib_file(path: Path, r: int = 8, layers: int = 3) -> dict[str, torch.Tensor]:
    """A .bin file as the LoRA paper's code writes it."""
    torch.manual_seed(r)
    name = "roberta.encoder.layer.{}.attention.self.{}.lora_{}"
    tensors = {
        name.format(i, p, side): torch.randn(*shape)
        for i in range(layers)
        for p in ("query", "value")
        for side, shape in (("A", (r, 32)), ("B", (32, r)))
    }
    head = {"classifier.dense.weight": torch.randn(32, 32), "classifier.dense.bias": torch.ones(32)}
    torch.save(tensors | head, path)
    return tensors


@pytest.mark.parametrize("molex", ["", "--no-molex"])
def test_init_from_the_lora_papers_own_file(roberta, glue, tmp_path, molex):
    file = tmp_path / "mnli.bin"
    tensors = loralib_file(file)
    _, start = prepared(roberta, glue, molex)
    s, ours = prepared(roberta, glue, f"{molex} --init-from {file}")
    assert s.init == str(file) and ours.keys() == start.keys()
    for name, w in tensors.items():
        i, p, side = re.search(r"(\d)\.attention\.self\.(\w)\w+\.lora_(.)", name).groups()
        assert torch.equal(ours.pop(f"layers.blocks.{i}.attn.{p}.{side}"), w)
    assert all(torch.equal(p, start[n]) for n, p in ours.items())  # gate and head are new


# ---------------------------------------------------------------------------------------- bad input


def a_copy(run: Path, to: Path, **changes) -> Path:
    """A finished run with another config."""
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--init-from {lora} --lora-r 4", "has not the shapes of this run's LoRA"),
        ("--init-from {molex} --tune bitfit", "has not the shapes"),
        ("--init-from {molex} --no-molex", "has MoLEx; give a run without it as well"),
        ("--init-from {molex} --compare", "has MoLEx; give a run without it as well"),
        ("--init-from {other}", "is a run of roberta-large, not of "),
        ("--init-from {tmp}/nosuch", "nosuch is not a run with a finished epoch"),
        ("--init-from {tmp}/wide.bin", "wide.bin was made for a model of another shape or rank"),
        ("--init-from {tmp}/deep.bin", "deep.bin was made for a model of another shape or rank"),
        ("--init-from {tmp}/text.bin", "text.bin cannot be read: it is damaged"),
        ("--init-from {tmp}/none.bin", "none.bin holds no lora_A and lora_B"),
        ("--init-from {lora} {molex} {lora}", "--init-from"),
        ("--max-length 5", "2 texts do not fit into 5 tokens; raise --max-length"),
        ("--tune all", "--tune"),
        ("--task e2e", "is an encoder, which cannot write text"),
        ("--data {tmp}", "must hold GLUE's own folders"),
        ("--data {part} --task glue", "STS-B/dev.tsv is missing"),
        ("--data {broken}", "RTE/dev.tsv, line 2: label 'perhaps' is not one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(roberta, glue, mnli, tmp_path, failure, flags, message):
    loralib_file(tmp_path / "wide.bin", r=4)
    loralib_file(tmp_path / "deep.bin", layers=4)
    torch.save({"classifier.dense.weight": torch.ones(2)}, tmp_path / "none.bin")
    (tmp_path / "text.bin").write_text("lora_A")
    if "{part}" in flags:
        shutil.copytree(glue, tmp_path / "part")
        (tmp_path / "part/STS-B/dev.tsv").unlink()
    if "{broken}" in flags:
        shutil.copytree(glue, tmp_path / "broken")
        write_official(tmp_path / "broken", "rte", "dev", [(("a", "b"), "perhaps")])
    if "{other}" in flags:
        a_copy(mnli[True], tmp_path / "other", model="roberta-large")
    flags = flags.format(
        lora=mnli[False], molex=mnli[True], tmp=tmp_path, part=tmp_path / "part",
        broken=tmp_path / "broken", other=tmp_path / "other",
    )  # fmt: skip
    out = tmp_path / "runs"
    command = f"--model {roberta} --task rte --data {glue} --max-steps 1 --out {out} {flags}"
    assert message in failure(run_main, command)
    assert not out.exists()


def test_a_missing_task_stops_the_command_before_it_trains(roberta, glue, tmp_path):
    """The last of the eight, in a process of its own."""
    shutil.copytree(glue, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/STS-B")
    command = (
        f"{sys.executable} {ROOT / 'train.py'} --model {roberta} --task glue"
        f" --data {tmp_path / 'part'} --out {tmp_path / 'runs'}"
    )
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: \S*STS-B/train.tsv is missing.*\n", done.stderr)
    assert not (tmp_path / "runs").exists()
