"""Tests of nano/gpt2, the embedded model, and of nano/pretrain.py, which made it."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from data import Tokenizer, read_e2e
from model import load, read_config
from nano.make_e2e import NAMES, UNSEEN_NAMES
from nano.pretrain import SPECIAL, documents, restaurant_guide

ROOT = Path(__file__).parents[1]


def test_the_committed_model_is_small():
    folder = ROOT / "nano/gpt2"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8e6
    assert {f.name for f in folder.iterdir()} == {
        "config.json", "merges.txt", "model.safetensors", "vocab.json"
    }  # fmt: skip
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.float16}
    model = load(str(folder))
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    assert model.config.n_layer >= 6


def test_the_committed_model_has_learned_english():
    """A sentence of its own kind is far likelier than the same words in another order."""
    model = load(str(ROOT / "nano/gpt2"))
    tokenizer = Tokenizer.from_folder(ROOT / "nano/gpt2", model.config)
    rng, better = random.Random(0), 0
    sentences = [ref for _, ref in read_e2e("nano/e2e", "dev")[:40]]
    for sentence in sentences:
        words = sentence.split()
        rng.shuffle(words)
        losses = []
        for text in (sentence, " ".join(words)):
            ids = torch.tensor([[model.config.eos, *tokenizer.encode(text)]])
            log_p = model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            losses.append(-log_p.mean().item())
        better += losses[0] + 1 < losses[1]
    assert better >= 38


def test_the_guide_holds_nothing_of_the_data_set():
    guide = restaurant_guide(900)
    assert len(set(guide)) > 890
    for three in zip(guide[::3], guide[1::3], guide[2::3], strict=True):
        assert any(all(name in text for text in three) for name in NAMES)
    assert not any(name in text for text in guide for name in UNSEEN_NAMES)
    references = {
        ref for split in ("train", "dev", "test") for _, ref in read_e2e("nano/e2e", split)
    }
    assert not references & {text.strip() for text in guide}


def pretrain(text: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    tiny = "--guide 5 --vocab 300 --layers 2 --width 16 --heads 2 --length 16 --batch 4"
    command = [sys.executable, "nano/pretrain.py", "--text", text, "--out", out, *tiny.split()]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("One fish, two fish.\n\nRed fish, blue fish.\n" * 30)
    (tmp_path / "b.txt").write_text("An old pond.\n \nA frog leaps in: splash!")
    return tmp_path


def test_documents_are_parted_by_blank_lines(text):
    assert documents(text)[-3:] == [
        "Red fish, blue fish.",
        "An old pond.",
        "A frog leaps in: splash!",
    ]


def test_pretraining_writes_what_transformers_reads(text):
    out = text / "out"
    done = pretrain(text, out, "--steps", "6")
    assert done.returncode == 0 and "validation loss" in done.stdout, done.stderr
    theirs, ours = GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32).eval(), load(str(out))
    ids = torch.randint(0, 300, (2, 16))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    tokenizer = Tokenizer.from_folder(out, read_config(out))
    assert tokenizer.eos == 0 and SPECIAL["gpt2"][0] not in tokenizer.decode([0])
    again = pretrain(text, out, "--steps", "8", "--resume")
    assert again.returncode == 0 and "step 8" in (out / "log.txt").read_text()


def test_pretraining_without_text_says_so(tmp_path):
    done = pretrain(tmp_path, tmp_path / "out")
    assert done.returncode == 2 and "holds no *.txt" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
