"""Tests of nano/gpt2 and nano/roberta, the embedded models, and of nano/pretrain.py."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_lm
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, RobertaForMaskedLM, RobertaTokenizer

from data import Tokenizer, encode_texts, read_e2e
from model import Config, Transformer, load
from nano.make_e2e import NAMES, UNSEEN_NAMES
from nano.pretrain import SPECIAL, documents, language_loss, pack, restaurant_guide
from support.checkpoints import our_config

ROOT = Path(__file__).parents[1]
THEIRS = {"gpt2": GPT2LMHeadModel, "roberta": RobertaForMaskedLM}
both = pytest.mark.parametrize("family", ["gpt2", "roberta"])


@both
def test_the_committed_model_is_small(family):
    folder = ROOT / "nano" / family
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8e6
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    }
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.float16}
    model = load(str(folder))
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    assert model.config.n_layer >= 6


@both
def test_the_committed_model_is_one_for_transformers(family):
    folder = ROOT / "nano" / family
    theirs = THEIRS[family].from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(5, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_lm(folder)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_roberta_encodes_a_pair_as_transformers_does():
    folder = ROOT / "nano/roberta"
    tokenizer = Tokenizer.load(folder, Config.load(folder))
    theirs = RobertaTokenizer.from_pretrained(folder)
    pair = "Tansy is a Thai pub.", "It's by the river, near Café Solvang <mask>."
    ids = theirs(*pair, split_special_tokens=True)["input_ids"]
    assert encode_texts(tokenizer, pair, 99) == ids
    assert ids[0] == 0 and ids[-1] == 2 and ids.count(2) == 3 and 4 not in ids


@both
def test_the_committed_model_has_learned_english(family):
    """A sentence of its own kind is far likelier than the same words in another order."""
    model = load_lm(ROOT / "nano" / family)
    tokenizer = Tokenizer.load(ROOT / "nano" / family, model.config)
    rng, better = random.Random(0), 0
    sentences = [ref for _, ref in read_e2e("nano/e2e", "dev")[:40]]
    for sentence in sentences:
        words = sentence.split()
        rng.shuffle(words)
        losses = []
        for text in (sentence, " ".join(words)):
            ids = torch.tensor([0, *tokenizer.encode(text), 2])
            if family == "gpt2":
                log_p = model(ids[None, :-1]).log_softmax(-1)[0].gather(1, ids[1:, None])
            else:  # each token in turn is masked
                hidden = torch.eye(len(ids), dtype=torch.bool)[1:-1]
                logits = model(torch.where(hidden, 4, ids))[hidden]
                log_p = logits.log_softmax(-1).gather(1, ids[1:-1, None])
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


@both
def test_pretraining_writes_what_transformers_reads(text, family):
    out = text / "out"
    done = pretrain(text, out, "--steps", "6", "--family", family)
    assert done.returncode == 0 and "validation loss" in done.stdout, done.stderr
    theirs, ours = THEIRS[family].from_pretrained(out, dtype=torch.float32).eval(), load_lm(out)
    ids = torch.randint(5, 300, (2, 16))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    tokenizer = Tokenizer.load(out, Config.load(out))
    special = SPECIAL[family]
    assert tokenizer.eos == {"gpt2": 0, "roberta": 2}[family]
    assert tokenizer.decode([*range(len(special))]) == ""
    assert not {*range(len(special))} & {*tokenizer.encode(" ".join(special))}
    again = pretrain(text, out, "--steps", "8", "--resume", "--family", family)
    assert again.returncode == 0 and "step 8" in (out / "log.txt").read_text()


def test_blocks_of_roberta_are_made_like_its_pairs():
    folder = ROOT / "nano/roberta"
    config = Config.load(folder)
    tokenizer = Tokenizer.load(folder, config)
    blocks = pack(tokenizer, ["One fish.", "Two fish."] * 5, config, 12)
    assert (blocks[:, 0] == 0).all() and blocks.shape[1] == 12
    pair = encode_texts(tokenizer, ("One fish.", "Two fish."), 99)
    assert blocks[:, 1:].flatten()[: len(pair) - 1].tolist() == pair[1:]


def test_masked_tokens_alone_are_predicted():
    """15% of the ordinary tokens count, 80% of them as <mask>; special ones never do."""
    config = Config(**our_config(dict(
        model_type="roberta", vocab_size=50, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8, max_position_embeddings=130,
        layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=2,
    )))  # fmt: skip
    model, seen = Transformer(config), {}
    hidden, logits = model.hidden, model.logits
    model.hidden = lambda ids: seen.setdefault("h", hidden(seen.setdefault("ids", ids)))
    model.logits = lambda h: logits(seen.setdefault("chosen", h))
    blocks = torch.randint(5, 50, (400, 128), generator=torch.Generator().manual_seed(0))
    blocks[:, ::4] = 2
    language_loss(model, blocks, torch.Generator().manual_seed(0))
    share = len(seen["chosen"]) / (blocks != 2).sum()
    masked, changed = seen["ids"] == 4, (seen["ids"] != blocks)
    assert 0.145 < share < 0.155
    assert 0.79 < masked.sum() / len(seen["chosen"]) < 0.81
    random = (changed & ~masked).sum() / len(seen["chosen"])
    assert 0.09 < random < 0.105  # a random token may be the same one
    assert not changed[blocks == 2].any()


def test_pretraining_without_text_says_so(tmp_path):
    done = pretrain(tmp_path, tmp_path / "out")
    assert done.returncode == 2 and "holds no *.txt" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
