"""experiments/beam_search.py: the public LoRA code's search by its definition, what sets it apart
from ours, the table against the run's own scores.

pytest tests/test_beam_search.py
"""

import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import call, family_flags, meteor, printed_by
from test_generate import random_prompts, repeats
from test_molex import lora_model, molex_model

import eval as evaluation
from eval import beam_search
from experiments import beam_search as script
from model import Config, Transformer
from support.files import locate
from support.settings import Settings

# ------------------------------------------------------------ against a search in plain Python


def slow_search(model, prompt, ends, beams, length_penalty, ngram, max_new_tokens) -> list[int]:
    """Every hypothesis is a list; the ban leaves the softmax by summing over what is allowed. No
    cache: the model reads prompt and answer anew, and is told which of it is the prompt."""

    def log_p(answer: list[int]) -> dict[int, float]:
        given = torch.tensor([[True] * len(prompt) + [False] * len(answer)])
        with torch.no_grad():
            h = model.hidden(torch.tensor([prompt + answer]), torch.ones_like(given), given)
        logits = model.logits(h[0, -1]).tolist()
        allowed = [t for t in range(len(logits)) if not ngram or not repeats([*answer, t], ngram)]
        log_sum = math.log(sum(math.exp(logits[t]) for t in allowed))
        return {t: logits[t] - log_sum for t in allowed}

    living, finished = [(0.0, [])], []
    for s in range(1, max_new_tokens + 1):
        grown = [(score + p, [*a, t]) for score, a in living for t, p in log_p(a).items()]
        grown = sorted(grown, key=lambda beam: -beam[0])[:beams]
        living = [(score, a) for score, a in grown if a[-1] not in ends]
        done = grown if s == max_new_tokens else [b for b in grown if b not in living]
        finished += [(score / len(a) ** length_penalty, a) for score, a in done]
    answer = max(finished, key=lambda beam: beam[0])[1]
    return answer[:-1] if answer[-1] in ends else answer


@pytest.mark.parametrize("beams, length_penalty, ngram", [(3, 0.9, 4), (4, 2.0, 2), (2, 0.0, 1)])
@pytest.mark.parametrize("make", [lora_model, molex_model])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_search_equals_the_slow_one_and_is_not_ours(family, make, beams, length_penalty, ngram):
    model, prompts = make(family), random_prompts(6)
    search = (beams, length_penalty, ngram, 12)
    expected = [slow_search(model, p, {0}, *search) for p in prompts]
    assert [beam_search(model, [p], 0, *search, "lora")[0] for p in prompts] == expected
    if make is lora_model:  # MoLEx chooses one route for the batch
        assert beam_search(model, prompts, 0, *search, "lora") == expected
    assert [beam_search(model, [p], 0, *search)[0] for p in prompts] != expected


# ------------------------------------------------------------------------ one difference at a time

END, A, B, C, D, E, F, G, START = range(9)


def chain(**follows: dict[int, float]) -> Transformer:
    """A model for which the next token depends on the last one alone: follows["START"][A] is the
    probability of A after START. What a token's line leaves is spread over all others."""
    n = 9
    p = torch.empty(n, n)
    for last in range(n):
        line = next((line for name, line in follows.items() if globals()[name] == last), {})
        p[last] = (1 - sum(line.values())) / (n - len(line)) + 1e-9
        for token, value in line.items():
            p[last, token] = value
    config = Config(
        family="llama", **family_flags("llama"),
        vocab_size=n, n_layer=1, n_head=1, n_kv_head=1, d_model=n, d_head=n + 1,
        d_ff=n, max_positions=64, norm_eps=0.0, activation="silu", tied=False, bias=False,
        rope=dict(rope_theta=100.0, rope_type="default"),
    )  # fmt: skip
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the layer adds nothing
        model.norm.weight.fill_(n**-0.5)  # RMS norm makes sqrt(n) of the one in a one-hot vector
        model.embed.weight.copy_(torch.eye(n))
        model.head.weight.copy_(p.log().T)
    return model


def both(model: Transformer, *search: float) -> tuple[list[int], list[int]]:
    rules = ("transformers", "lora")
    return tuple(beam_search(model, [[START]], END, *search, rule)[0] for rule in rules)


def test_a_finished_beam_takes_a_place():
    """END is the second of two beams, so that B, the third, is not followed up."""
    many = {C: 0.3, D: 0.25, E: 0.25, F: 0.2}
    model = chain(START={A: 0.5, END: 0.3, B: 0.2}, A=many, B={END: 1.0})
    assert both(model, 2, 1.0, 0, 2) == ([B], [A, C])
    assert both(model, 3, 1.0, 0, 2) == ([B], [B])


def test_banned_tokens_leave_the_softmax():
    """After A comes A, banned by n = 1; the little that is left ends there. Renormalised it is as
    likely as the end after B."""
    model = chain(START={A: 0.6, B: 0.4}, A={A: 0.98, END: 0.02}, B={END: 0.4, C: 0.6}, C={D: 1.0})
    assert both(model, 3, 0.0, 1, 3) == ([B, C, D], [A])
    assert both(model, 3, 0.0, 0, 3) == ([A, A, A], [A, A, A])


def test_all_steps_are_run():
    """Two answers are finished after two steps, and both better than the one that is open, of three
    tokens to come for sure. By a length penalty of 2 it is the best in the end."""
    model = chain(
        START={END: 0.5, A: 0.3}, A={END: 0.9, C: 0.1}, C={D: 1.0}, D={E: 1.0}, E={F: 1.0},
        F={G: 1.0}, G={END: 1.0},
    )  # fmt: skip
    assert both(model, 2, 2.0, 0, 9) == ([A], [A, C, D, E, F, G])


def test_without_an_end_the_best_of_the_longest_is_taken():
    model = chain(START={A: 0.7, B: 0.3}, A={A: 1.0}, B={B: 1.0})
    assert both(model, 2, 0.9, 0, 5) == ([A] * 5, [A] * 5)


# --------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, list[str]]:
    """The small form, less trained, on a part of the test set: its run, and what it prints."""
    folder = tmp_path_factory.mktemp("beam_search")
    less = mock.patch.object(script, "SMALL", "--no-molex --max-steps 60 --test-limit 6")
    with less, mock.patch.object(evaluation, "meteor", meteor):
        lines = printed_by(script, "--out", folder, "--device", "cpu")
    return next(folder.iterdir()), lines


def test_table(small):
    """Ours are the run's own scores; the difference is that of the two lines."""
    folder, lines = small
    blank, head, names, *rows = lines
    assert not blank and re.fullmatch(rf"{folder.name}: \d of 6 outputs differ \(\d+\.\d%\)", head)
    assert names.split() == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDER"]
    cells = {row[:12].strip(): [float(x) for x in row[12:].split()] for row in rows}
    assert [*cells] == ["ours", "LoRA code's", "difference"]
    scores = json.loads((folder / "scores.json").read_text())
    assert cells["ours"] == [round(scores[name.lower()], 4) for name in names.split()]
    for ours, theirs, difference in zip(*cells.values(), strict=True):
        assert difference == pytest.approx(theirs - ours, abs=1.5e-4)


def test_outputs_that_differ_are_counted_and_scored(small, monkeypatch):
    """A search that answers nothing to the first two prompts, of three."""
    folder, _ = small
    said = []

    def quiet(model, prompts, eos, **search):
        said.append(search["beam_rule"])
        return [[]] if 3 < len(said) < 6 else beam_search(model, prompts, eos, **search)

    monkeypatch.setattr(evaluation, "beam_search", quiet)
    monkeypatch.setattr(evaluation, "meteor", meteor)
    lines = printed_by(script, folder, "--limit", 3)
    assert said == ["transformers"] * 3 + ["lora"] * 3
    assert lines[:2] == ["", f"{folder.name}: 2 of 3 outputs differ (66.7%)"]
    assert all(float(cell) < 0 for cell in lines[-1].split()[1:])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["RUN"], r".* is a run on cola; give runs on e2e"),
        ([str(locate("nano/gpt2"))], r".* is not a run with a finished epoch"),
        (["RUN", "--limit", "0"], r"argument --limit: 0 is less than 1"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, failure, flags, message):
    monkeypatch.setattr(
        script, "load_run", lambda *_: (None, None, Settings("", "cola", None, 0, None))
    )
    if "RUN" not in flags:
        monkeypatch.undo()
    assert re.fullmatch(f"error: {message}", failure(call, script, *flags))
