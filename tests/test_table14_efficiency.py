"""experiments/table14_efficiency.py: its printed tables against the paper's LoRA row, FLOP written
out by hand and FLOP counted on real passes; the order of measuring.

pytest tests/test_table14_efficiency.py
"""

import json
import re

import pytest
import torch
from conftest import call, need_shared, printed_by
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import table14_efficiency as table14
from experiments.table14_efficiency import ALPACA, LLAMA, LORA, count, measure, row
from lora import add_lora
from model import Config, load
from molex import upcycle
from support.checkpoints import our_config
from support.files import InputError

# As in Table 14: total, trainable and their share, FLOP of a sample.
PAPER_LORA = ["1,236,666,368", "851,968", "0.0689", "12.329 T"]


@pytest.fixture(scope="module")
def tables() -> list[dict[str, list[str]]]:
    """What the small form prints, label -> cells, for Llama and for nano/gpt2."""
    lines = printed_by(table14, "--rounds", 3, "--tokens", 64, "--batch", 2)
    cells = [re.split(r"\s{2,}", line) for line in lines]
    split = next(i for i, line in enumerate(lines) if line.startswith("nano/gpt2, samples of 64"))
    return [{c[0]: c[1:] for c in part if len(c) == 9} for part in (cells[:split], cells[split:])]


def amount(cell: str) -> float:
    """ "12.329 T" -> 12.329e12"""
    number, prefix = cell.split()
    return float(number) * {"G": 1e9, "T": 1e12}[prefix]


def layer_flop(c: Config, tokens: int) -> int:
    """One layer of a decoder with LoRA on q and v: a product (m, n) (n, k) is 2 m n k."""
    D, wide, narrow = c.d_model, c.n_head * c.d_head, c.n_kv_head * c.d_head
    attention = (
        2 * D * wide + 2 * D * narrow + 2 * tokens * wide
    )  # q and o, k and v, scores and mix
    adapters = LORA["r"] * (D + wide) + LORA["r"] * (D + narrow)
    mlp = (3 if c.family == "llama" else 2) * D * c.d_ff
    return 2 * tokens * (attention + adapters + mlp)


def test_llama_is_the_papers_lora_row_with_molex_beside_it(tables):
    llama = tables[0]
    for label in ("LoRA, paper", "LoRA"):
        assert [llama[label][i] for i in (0, 1, 2, 4)] == PAPER_LORA
    gate = 2048 * 16 + 16
    most, least = (llama[f"MoLEx, all slots {x}"] for x in ("add another", "pick their own"))
    for cells in (most, least):
        assert cells[:2] == [f"{1_236_666_368 + gate:,}", f"{851_968 + gate:,}"]
        assert (cells[3], cells[5:]) == ("-", ["-", "-", "-"])  # nothing of it was measured
    assert [llama["MoLEx, paper"][i] for i in (0, 1, 2, 4)] == [most[i] for i in (0, 1, 2, 4)]
    c = Config(**our_config(LLAMA))  # FLOP outside the layers: the LM head and the gate
    rest = 2 * 4096 * c.d_model * (c.vocab_size + 16 * 16)
    for cells, layers in ((most, 32), (least, 16)):
        assert cells[4] == f"{(layers * layer_flop(c, 4096) + rest) / 1e12:.3f} T"


@pytest.mark.parametrize("name", ["llama", "nano"])
def test_flop_are_those_of_the_products_by_hand(name):
    c = Config(**our_config(LLAMA)) if name == "llama" else load("nano/gpt2").config
    N, T = 96, c.n_layer
    head, gate = 2 * N * c.d_model * c.vocab_size, T * 2 * N * c.d_model * T
    assert count(c, N, None)[2] == T * layer_flop(c, N) + head
    for others in (0, 3, T):  # so many slots run a second layer
        route = [(t + (t < others)) % T for t in range(T)]
        assert count(c, N, route)[2] == (T + others) * layer_flop(c, N) + head + gate


def test_flop_are_those_of_a_real_pass_of_molex(tables):
    """Real weights, votes and MoLEx; attention in plain products, which the counter sees."""
    torch.manual_seed(3)  # a gate that picks layer 5 everywhere, then one that picks layer 1
    model = upcycle(add_lora(load("nano/gpt2"), **LORA))
    for layer in (5, 1):
        with torch.no_grad():
            model.layers.gates[0].bias[layer] += 1000
        model.layers.routes.counts.zero_()
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                model(torch.arange(64)[None])
            model.layers.gates[0].bias[layer] -= 1000
        assert model.layers.routes.counts[:, layer].tolist() == [1] * 8
        assert counter.get_total_flops() == count(model.config, 64, [layer] * 8)[2]


def test_measured_rows_fit_together(tables):
    nano = tables[1]
    (label,) = (x for x in nano if re.search(r"\d of 8 slots", x))
    for name in ("LoRA", label):
        flop, seconds, speed = amount(nano[name][4]), float(nano[name][5]), amount(nano[name][6])
        assert flop / seconds == pytest.approx(speed, rel=0.01)
        minutes, rest = nano[name][7].split(":")
        assert int(minutes) * 60 + int(rest) == pytest.approx(ALPACA * seconds, rel=0.01, abs=1)
    others = int(re.search(r"(\d) of 8", label)[1])
    config = load("nano/gpt2").config
    most, least = (count(config, 64, route)[2] for route in ([*range(1, 8), 0], [*range(8)]))
    expected = least + others * layer_flop(config, 64)
    assert least < expected <= most
    assert amount(nano[label][4]) == pytest.approx(expected, rel=2e-3)


def test_methods_take_turns_and_the_first_round_is_left_out(monkeypatch):
    model, seen, clock = load("nano/gpt2"), [], iter(range(100))
    stacks = {name: nn.Identity() for name in "ab"}
    for name, stack in stacks.items():
        stack.forward = lambda z, ctx, name=name: seen.append(name) or z
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) ** 2)
    seconds, peak = measure(model, stacks, torch.zeros(1, 4, dtype=torch.long), rounds=2)
    assert seen == [*"ababab"]
    # pass k lasts from (2k)^2 to (2k + 1)^2, that is 4k + 1
    assert seconds == {"a": [9, 17], "b": [13, 21]}
    assert peak == {"a": None, "b": None}


def test_medians_are_of_a_sample_and_the_ratio_is_of_each_round(monkeypatch):
    seconds = {"LoRA": [2.0, 3.0, 8.0], "MoLEx": [4.0, 12.0, 8.0]}  # 2, 4 and 1 times as long
    peaks = {"LoRA": 5_000_000, "MoLEx": 7_000_000}
    monkeypatch.setattr(table14, "measure", lambda *a: (seconds, peaks))
    lines = printed_by(table14, "--tokens", 8, "--batch", 4)
    out = "\n".join(lines).partition("nano/gpt2")[2]
    lora, molex = (re.search(rf"^{x}.*", out, re.M)[0].split() for x in ("LoRA", "MoLEx"))
    assert (lora[-7], lora[-4], molex[-7], molex[-4]) == ("5", "0.75", "7", "2")
    assert "MoLEx takes 2.00 x LoRA's time" in out


def test_row_in_the_papers_units():
    cells = row(1_236_666_368, 851_968, 12_329_240_494_080, 0.506, 10_442_000_000)
    assert cells[:7] == [*PAPER_LORA[:3], "10,442", "12.329 T", "0.506", "24.366 T"]
    assert cells[7] == "438:33"  # all of Alpaca, 52,002 samples, where the paper has 4:59


def test_llama_config_is_the_hubs():
    file = need_shared("models/configs/llama-3.2-1b.json")
    hub = Config(**our_config(json.loads(file.read_text("utf-8"))))
    ours = Config(**our_config({**LLAMA, "bos_token_id": hub.bos, "eos_token_id": hub.eos}))
    assert ours == hub


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tokens", "257"], "257 tokens are more than the 256 positions"),
        (["--batch", "0"], "--batch: 0 is less than 1"),
        (["--model", "nano"], "no config.json"),
    ],
)
def test_what_the_user_can_put_right(flags, message):
    with pytest.raises(InputError, match=message):
        call(table14, *flags)
