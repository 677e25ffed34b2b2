"""Tests of molex.py.

Eq. 4 stands here a second time: `by_hand` goes through tokens, slots and layers in plain loops, one
sequence at a time and without padding, and the module has to equal it in every combination of
options. What the loops cannot show is tested on its own: padding, batch mates, the cache, numerics,
several processes, CUDA's two streams.

    pytest tests/test_molex.py
"""

import copy
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import family_flags
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train
from data import Example
from eval import beam_search
from lora import add_lora, loras
from model import Cache, Config, Context, Transformer, rope_angles
from molex import GATES, CosineGate, MoLExConfig, own_size, upcycle
from support.cuda import fork, join
from support.files import InputError

FAMILIES = ("gpt2", "llama", "roberta")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROUTES = ("batch", "on device", "sequence")
VOCAB = 31
# Token ids, and how many of them are the prompt.
SEQUENCES = [
    ([3, 17, 8, 25, 11, 30, 4], 4),
    ([9, 2, 14, 21], 3),
    ([5, 28, 19, 7, 12, 6], 2),
]


def lora_model(family: str, T: int = 4, d_model: int = 16) -> Transformer:
    """A small random model of T layers with a LoRA that is no longer zero."""
    torch.manual_seed(0)
    config = Config(
        family=family, **family_flags(family),
        vocab_size=VOCAB, n_layer=T, n_head=4, d_model=d_model,
        n_kv_head=2 if family == "llama" else 4, d_head=d_model // 4, d_ff=2 * d_model,
        max_positions=256, norm_eps=1e-5, tied=True, bias=family != "llama",
        activation={"gpt2": "gelu_new", "roberta": "gelu", "llama": "silu"}[family],
        pad=1 if family == "roberta" else None, rope=dict(rope_theta=100.0, rope_type="default"),
    )  # fmt: skip
    model = add_lora(Transformer(config), r=2, alpha=4)
    for lora in loras(model).values():
        nn.init.normal_(lora.B, std=0.3)
    return model.eval()


def molex_model(family: str, T: int = 4, d_model: int = 16, **options) -> Transformer:
    """The same after upcycling, with a gate so decisive that routes differ between slots and
    sequences, and every gate and alpha its own. route="on device" is "batch" with on_device."""
    if options.get("route") == "on device":
        options |= dict(route="batch", on_device=True)
    model = upcycle(lora_model(family, T, d_model), MoLExConfig(proj_dim=5, **options))
    with torch.no_grad():
        for gate in model.layers.gates:
            if isinstance(gate, nn.Linear):
                gate.weight *= 5
            else:
                gate.log_temperature += 0.2 * torch.randn(())
        if model.layers.config.learn_alpha:
            model.layers.alpha_logit += torch.randn_like(model.layers.alpha_logit) - 2
    return model


def gate_to(model: Transformer, biases: list[list[float]]) -> None:
    """Let gate k score the layers biases[k], whatever it is given."""
    with torch.no_grad():
        for gate, bias in zip(model.layers.gates, biases, strict=True):
            gate.weight.zero_()
            gate.bias.copy_(torch.tensor(bias))


class Spy:
    """Notes what `MoLEx.choose` answers: routes[t][i], the layers that joined slot t for sequence
    i; and, in `runs`, each time a layer runs: slot, layer, number of sequences."""

    def __init__(self, model: Transformer) -> None:
        self.molex, self.choose = model.layers, model.layers.choose
        self.routes: dict[int, list[list[int]]] = {}
        self.runs: list[tuple[int, int, int]] = []

    def __enter__(self) -> "Spy":
        self.molex.choose = self.note_choice
        self.hooks = [block.register_forward_pre_hook(self.note_run) for block in self.molex.blocks]
        return self

    def __exit__(self, *_) -> None:
        del self.molex.choose
        for hook in self.hooks:
            hook.remove()

    def note_choice(self, t: int, log_a: Tensor, best: Tensor, ctx: Context) -> Tensor:
        picks = self.choose(t, log_a, best, ctx)
        self.routes[t] = picks.expand(len(log_a), -1).tolist()
        return picks

    def note_run(self, block: nn.Module, args: tuple) -> None:
        self.runs.append((*args[2], len(args[0])))


def pad(sequences: list, left: bool = False, extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with noise as padding, the mask of real tokens and that of the prompt."""
    N = max(len(ids) for ids, _ in sequences) + extra
    padded = torch.randint(2, VOCAB, (len(sequences), N))
    mask, prompt = torch.zeros(2, *padded.shape, dtype=torch.bool)
    for i, (ids, n_prompt) in enumerate(sequences):
        start = N - len(ids) if left else 0
        padded[i, start : start + len(ids)] = torch.tensor(ids)
        mask[i, start : start + len(ids)] = True
        prompt[i, start : start + n_prompt] = True
    return padded, mask, prompt


def run(model: Transformer, sequences: list, left: bool = False, extra: int = 0):
    """Logits of the real tokens of every sequence, the load-balance loss and the routes."""
    ids, mask, prompt = pad(sequences, left, extra)
    with Spy(model) as spy:
        logits = model(ids, mask, prompt)
    return [x[m] for x, m in zip(logits, mask, strict=True)], model.layers.load_balance, spy.routes


def loss_of(logits: list[Tensor], load_balance: Tensor) -> Tensor:
    """Some scalar of both, in which every logit counts differently."""
    flat = torch.cat([x.flatten() for x in logits])
    return (flat * torch.linspace(-1, 2, len(flat), dtype=flat.dtype)).sum() / 50 + load_balance


# ----------------------------------------------------------------------------- Eq. 4 in plain loops


def affinities_by_hand(gate: nn.Module, z: Tensor, activation: str) -> Tensor:
    """(D,) -> (T,), section 2.2 and Table 5's "Cos" and "Sig"."""
    if isinstance(gate, CosineGate):
        p, temperature = gate.project.weight @ z, gate.log_temperature.exp()
        scores = torch.stack([p @ e / (p.norm() * e.norm()) / temperature for e in gate.layer])
    else:
        scores = gate.weight @ z + gate.bias
    if activation == "sigmoid":
        return 1 / (1 + (-scores).exp())
    return scores.exp() / scores.exp().sum()


def vote_by_hand(ballots: list[list[float]], vote: str, top_k: int) -> list[int]:
    """The layers that win, given the affinities of every voter (appendix B.1)."""
    layers = range(len(ballots[0]))
    mean = [sum(a[j] for a in ballots) / len(ballots) for j in layers]
    votes = [sum(a.index(max(a)) == j for a in ballots) for j in layers]
    if vote == "mean":
        return sorted(layers, key=lambda j: (-mean[j], j))[:top_k]
    return sorted(layers, key=lambda j: (-votes[j], -mean[j], j))[:top_k]


def by_hand(model: Transformer, sequences: list):
    """What `run` returns, from the definitions alone."""
    molex, family = model.layers, model.config.family
    c, T = molex.config, len(molex.blocks)
    mixing = list(range(T)) if c.layers is None else list(c.layers)
    zs, contexts, balance, routes = [], [], 0.0, {}
    for ids, _ in sequences:
        z, place = model.embed.weight[ids], torch.arange(len(ids))
        if family == "gpt2":
            z = z + model.positions.weight[place]
        if family == "roberta":  # numbers positions from pad + 1
            z = model.norm(z + model.positions.weight[place + 2] + model.token_type.weight[0])
        rope = rope_angles(model.config, place[None]) if family == "llama" else None
        real = torch.ones(1, len(ids), dtype=torch.bool)
        zs.append(z)
        contexts.append(Context(real, real, None, family != "roberta", rope))

    for t in range(T):
        # update[j][i]: u_j of sequence i
        update = [
            [block(z[None], x, (t, j))[0] - z for z, x in zip(zs, contexts, strict=True)]
            for j, block in enumerate(molex.blocks)
        ]
        if t not in mixing:
            zs = [z + u for z, u in zip(zs, update[t], strict=True)]
            continue
        k = mixing.index(t) if c.individual_gates else 0
        alpha = 1 / (1 + (-molex.alpha_logit[k]).exp()) if c.learn_alpha else c.alpha
        a = [[affinities_by_hand(molex.gates[k], token, c.activation) for token in z] for z in zs]

        ballots = [
            [token.tolist() for token in a[i][:n_prompt]]
            for i, (_, n_prompt) in enumerate(sequences)
        ]
        if c.route == "batch":
            ballots = [sum(ballots, [])] * len(sequences)
        routes[t] = [vote_by_hand(voters, c.vote, c.top_k) for voters in ballots]

        tokens = [token for sequence in a for token in sequence]
        for j in range(T):
            f = sum(int(token.argmax()) == j for token in tokens) / len(tokens)
            P = sum(token[j] / token.sum() for token in tokens) / len(tokens)
            balance = balance + T * f * P / len(mixing)

        new = []
        for i, z in enumerate(zs):
            rows = []
            for n in range(len(z)):
                v = torch.zeros_like(z[n])
                for j in routes[t][i]:
                    w = a[i][n][j]
                    if c.gate_weight == "straight-through" and c.top_k == 1:
                        w = 1 + w - w.detach()
                    elif c.gate_weight == "renormalised" and c.top_k == 1:
                        w = torch.ones_like(w)  # Eq. 4 as it stands
                    elif c.gate_weight != "prob":
                        w = w / sum(a[i][n][chosen] for chosen in routes[t][i])
                    u_j = update[j][i][n]
                    if c.borrow_size == "own":
                        u_j = u_j / u_j.norm() * update[t][i][n].norm()
                    v = v + w * u_j
                rows.append(z[n] + alpha * update[t][i][n] + (1 - alpha) * v)
            new.append(torch.stack(rows))
        zs = new
    if family != "roberta":
        zs = [model.norm(z) for z in zs]
    return [model.logits(z) for z in zs], balance, routes


OPTIONS = dict(
    top_k=(1, 2, 3),
    layers=(None, (1, 2)),
    learn_alpha=(False, True),
    individual_gates=(False, True),
    gate_weight=("renormalised", "straight-through", "prob"),
)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("vote", ["mode", "mean"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate", ["linear", "cosine"])
def test_equation_4_by_hand_in_every_combination(gate, activation, vote, route):
    fixed = dict(gate=gate, activation=activation, vote=vote, route=route, alpha=0.6)
    between_slots = between_sequences = 0
    for number, values in enumerate(itertools.product(*OPTIONS.values())):
        options = fixed | dict(zip(OPTIONS, values, strict=True))
        # 16 combinations for each top_k: every family meets every value
        model = molex_model(FAMILIES[number % 3], **options).double().train()
        with torch.no_grad():
            logits, balance, routes = run(model, SEQUENCES)
            expected, expected_balance, expected_routes = by_hand(model, SEQUENCES)
        assert routes == expected_routes, options
        for x, y in zip(logits, expected, strict=True):
            torch.testing.assert_close(
                x, y, rtol=0, atol=1e-10, msg=lambda m, o=options: f"{o} {m}"
            )
        assert balance.item() == pytest.approx(expected_balance.item(), abs=1e-12), options
        between_slots += len({str(picks) for picks in routes.values()}) > 1
        between_sequences += any(picks[0] != picks[1] for picks in routes.values())
    assert between_slots > 15, "the routes are too much alike to show anything"
    assert between_sequences > 15 if route == "sequence" else between_sequences == 0


@pytest.mark.parametrize("gate_weight", ["renormalised", "straight-through", "prob"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_equation_4_at_the_slots_own_size_by_hand(gate_weight, route, top_k):
    for family in FAMILIES:
        options = dict(gate_weight=gate_weight, route=route, top_k=top_k, alpha=0.6)
        model = molex_model(family, borrow_size="own", **options).double()
        with torch.no_grad():
            found, (expected, _, _) = run(model, SEQUENCES)[0], by_hand(model, SEQUENCES)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_own_size_keeps_the_direction_and_takes_the_length():
    torch.manual_seed(0)
    u, v = torch.randn(2, 3, 5, 16)
    v *= torch.logspace(-6, 6, 15).view(3, 5, 1)
    sized = own_size(v, u)
    torch.testing.assert_close(sized.norm(dim=-1), u.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(sized, v, dim=-1), torch.ones(3, 5))
    assert torch.equal(own_size(u, u), u)
    u[0, 0], v[1, 1], u[2, 2], v[2, 2] = 0, 0, 0, 0
    u.requires_grad_()
    v.requires_grad_()
    sized = own_size(v, u)
    assert not sized[[0, 1, 2], [0, 1, 2]].any() and sized.isfinite().all()
    sized.square().sum().backward()
    assert u.grad.isfinite().all() and v.grad.isfinite().all()


def test_without_a_prompt_mask_every_real_token_votes():
    model = molex_model("gpt2", top_k=2)
    everything = [(ids, len(ids)) for ids, _ in SEQUENCES]
    ids, mask, _ = pad(SEQUENCES)
    with Spy(model) as spy:
        model(ids, mask)
    assert spy.routes == by_hand(model, everything)[2] != by_hand(model, SEQUENCES)[2]


# ---------------------------------------------------------------------------------- LoRA, recovered


def logits_and_gradients(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    ids, mask, prompt = pad(SEQUENCES)
    logits = model.train()(torch.where(mask, ids, 0), mask, prompt)
    model.zero_grad()
    logits[mask].square().sum().backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if n.endswith((".A", ".B"))}


def assert_is_lora(model: Transformer) -> None:
    logits, gradients = logits_and_gradients(model)
    expected, expected_gradients = logits_and_gradients(lora_model(model.config.family))
    assert torch.equal(logits, expected)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 16
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("top_k, size", [(1, "as-is"), (3, "as-is"), (1, "own")])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("gate", ["linear", "cosine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_1_is_lora_bit_for_bit(family, gate, route, top_k, size):
    options = dict(gate=gate, route=route, top_k=top_k, borrow_size=size)
    assert_is_lora(molex_model(family, **options, alpha=1.0))


@pytest.mark.parametrize("size", ["as-is", "own"])
@pytest.mark.parametrize("gate_weight", ["renormalised", "straight-through", "prob"])
@pytest.mark.parametrize("vote", ["mode", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_that_picks_its_own_layer_is_lora_bit_for_bit(family, vote, gate_weight, size):
    options = dict(vote=vote, gate_weight=gate_weight, borrow_size=size)
    model = molex_model(family, **options, individual_gates=True, alpha=0.3)
    sure = 1e4 if gate_weight == "prob" else 3.0  # the affinity itself has to be 1
    gate_to(model, [[sure * (j == t) for j in range(4)] for t in range(4)])
    assert_is_lora(model)
    assert torch.equal(model.layers.routes.counts, 3 * torch.eye(4).long())
    ids, mask, prompt = pad(SEQUENCES)
    expected = model(ids, mask, prompt)
    model.layers.config = replace(model.layers.config, on_device=True)  # there it runs twice
    assert torch.equal(model(ids, mask, prompt), expected)


# ----------------------------------------------------------------------------------------- the vote


@pytest.mark.parametrize(
    "vote, affinities, winners",
    [
        # one vote each: the higher mean affinity decides, at the lower and at the higher index
        ("mode", [[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6]], [3, 0]),
        ("mode", [[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.3, 0.5]], [0, 3]),
        # two votes beat a higher mean
        ("mode", [[0.3, 0.26, 0.22, 0.22], [0.3, 0.26, 0.22, 0.22], [0, 0, 0, 1.0]], [0, 3]),
        ("mean", [[0.3, 0.26, 0.22, 0.22], [0.3, 0.26, 0.22, 0.22], [0, 0, 0, 1.0]], [3, 0]),
        # one vote each and equal means: the lower index
        ("mode", [[0.1, 0.1, 0.3, 0.5], [0.1, 0.1, 0.5, 0.3]], [2, 3]),
        # equal means: the lower index
        ("mean", [[0.1, 0.1, 0.3, 0.5], [0.1, 0.1, 0.5, 0.3]], [2, 3]),
        ("mean", [[0.25, 0.25, 0.25, 0.25]], [0, 1]),
        # the runner-up has no vote: the highest mean of those without
        ("mode", [[0.4, 0.1, 0.2, 0.3], [0.4, 0.1, 0.2, 0.3]], [0, 3]),
        ("mode", [[0.4, 0.3, 0.15, 0.15], [0.4, 0.3, 0.15, 0.15]], [0, 1]),
    ],
)
@pytest.mark.parametrize("route", ["batch", "sequence"])
def test_the_vote_and_its_ties(vote, affinities, winners, route):
    model = upcycle(
        lora_model("gpt2", d_model=4), MoLExConfig(vote=vote, route=route, top_k=2, layers=(0,))
    ).double()
    with torch.no_grad():  # z itself is the score
        model.layers.gates[0].weight.copy_(torch.eye(4))
        model.layers.gates[0].bias.zero_()
    z = torch.tensor(affinities, dtype=torch.float64).clamp(min=1e-9).log()[None]
    real = torch.ones(z.shape[:2], dtype=torch.bool)
    with Spy(model) as spy:
        model.layers(z, Context(real, real, None, True, None))
    assert spy.routes[0] == [winners]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_never_votes_nor_counts(family, route):
    model = molex_model(family, route=route, top_k=2, alpha=0.5).train()
    with torch.no_grad():
        logits, balance, routes = run(model, SEQUENCES)
        for left, extra in itertools.product((True, False), range(1, 8)):
            model.layers.routes.counts.zero_()
            more, more_balance, more_routes = run(model, SEQUENCES, left, extra)
            assert more_routes == routes
            assert model.layers.routes.counts.sum() == 4 * 2 * 3  # slots, K, sequences
            assert more_balance.item() == pytest.approx(balance.item(), abs=1e-6)
            for x, y in zip(more, logits, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answer_tokens_never_vote_and_never_reach_back(family, route):
    model = molex_model(family, route=route, alpha=0.5)
    dice, prompt_only = random.Random(1), [(ids[:n], n) for ids, n in SEQUENCES]
    with torch.no_grad():
        logits, _, routes = run(model, SEQUENCES)
        before, _, routes_before = run(model, prompt_only)
        assert routes_before == routes
        for x, y in zip(before, logits, strict=True):
            torch.testing.assert_close(x, y[: len(x)], rtol=0, atol=1e-5)
        for _ in range(20):
            place = dice.choice([1, 2, 3])  # so many answer tokens stay as they are
            other = [
                (ids[: n + place] + [dice.randrange(2, VOCAB) for _ in ids[n + place :]], n)
                for ids, n in SEQUENCES
            ]
            changed, _, other_routes = run(model, other)
            assert other_routes == routes
            for x, y, (_, n) in zip(changed, logits, SEQUENCES, strict=True):
                torch.testing.assert_close(x[: n + place], y[: n + place], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_routing_knows_no_batch_mates_and_batch_routing_does(family):
    dice = random.Random(3)
    sequences = [([dice.randrange(2, VOCAB) for _ in range(n)], n - 1) for n in (3, 8, 5, 7, 2, 8)]
    seen = {}
    for route in ("sequence", "batch"):
        model = molex_model(family, route=route, top_k=2, alpha=0.5)
        with torch.no_grad():
            together, _, routes = run(model, sequences)
            alone = [run(model, [s]) for s in sequences]
            pairs = [run(model, [s, sequences[0]]) for s in sequences]
        seen[route] = [
            all(routes[t][i] == single[2][t][0] == pair[2][t][0] for t in routes)
            and torch.allclose(together[i], single[0][0], rtol=0, atol=1e-5)
            and torch.allclose(together[i], pair[0][0], rtol=0, atol=1e-5)
            for i, (single, pair) in enumerate(zip(alone, pairs, strict=True))
        ]
        assert len({str(single[2]) for single in alone}) > 3
    assert all(seen["sequence"])
    assert not all(seen["batch"])


@pytest.mark.parametrize(
    "top_k, runs",
    [
        (1, [(0, 0), (1, 1), (1, 0), (2, 2), (2, 3), (3, 3)]),  # slots 0 and 3 pick themselves
        (2, [(0, 0), (0, 1), (1, 1), (1, 0), (1, 2), (2, 2), (2, 3), (3, 3), (3, 0)]),
    ],
)
def test_a_layer_runs_once_in_a_slot_also_if_it_is_the_slots_own(top_k, runs):
    model = molex_model("gpt2", top_k=top_k, individual_gates=True)
    gate_to(model, [[9, 8, 7, 6], [9, 7, 8, 6], [6, 7, 8, 9], [8, 6, 7, 9]])
    with Spy(model) as spy, torch.no_grad():
        model(*pad(SEQUENCES))
    assert spy.runs == [(t, j, len(SEQUENCES)) for t, j in runs]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_layer_that_any_sequence_chose_runs_once_and_no_other(top_k):
    model = molex_model("gpt2", route="sequence", top_k=top_k)
    with Spy(model) as spy, torch.no_grad():
        model(*pad(SEQUENCES))
    counts = torch.zeros(4, 4, dtype=torch.long)
    for t, picks in spy.routes.items():
        for j in sum(picks, []):
            counts[t, j] += 1
    assert torch.equal(model.layers.routes.counts, counts)
    assert ((counts > 0) & (counts < len(SEQUENCES))).any()
    runs = {(t, j, len(SEQUENCES)) for t in range(4) for j in range(4) if counts[t, j] or t == j}
    assert sorted(spy.runs) == sorted(runs)


# ------------------------------------------------------------------------------ a step never waits


def without_values(model: Transformer) -> Transformer:
    """The model with tensors that have shapes and no values, for FakeTensorMode. Whatever reads a
    value, or has a shape that depends on one, raises there."""
    for module in model.modules():
        for names in (module._parameters, module._buffers):
            for name, x in names.items():
                if x is not None:
                    fake = torch.empty(x.shape, dtype=x.dtype)
                    names[name] = nn.Parameter(fake, x.requires_grad) if x.is_leaf else fake
                    if names is module._buffers:
                        names[name] = fake
    return model


@pytest.mark.parametrize("options", [dict(), dict(top_k=2, vote="mean", learn_alpha=True)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_on_device_a_training_step_and_a_decoding_step_read_no_value(family, options):
    """The whole step, with the fused optimizer, as on CUDA no other reads its step number."""
    examples = [Example([3, 4, 5], [6, 7]), Example([3, 4, 5, 9], [6])]
    for on_device in (True, False):
        made = molex_model(family, on_device=on_device, **options)
        s = train.Settings("", "e2e", None, 0, made.layers.config, clip=1.0)
        for lora in loras(made).values():
            lora.dropout = 0.1
        with FakeTensorMode():
            model = without_values(made).train()
            optimizer, _ = train.make_optimizer(model, s, 10)
            for group in optimizer.param_groups:
                group["fused"] = True
            if not on_device:  # otherwise the CPU asks for the layer's number
                with pytest.raises(DataDependentOutputException):
                    train.train_step(model, optimizer, examples, s)
                continue
            assert train.train_step(model, optimizer, examples, s).shape == ()
            cache, ids = Cache(), torch.zeros(2, 5, dtype=torch.long)
            with torch.no_grad():
                model.eval().hidden(ids, ids == 0, cache=cache)
                sees = torch.ones(2, 3, 8, dtype=torch.bool)  # three beams each
                assert model(ids[:, :3], cache=cache, sees=sees).shape == (2, 3, VOCAB)


# ---------------------------------------------------------------------------------------- gradients


def trained(model: Transformer) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("gate, activation", [("linear", "softmax"), ("cosine", "sigmoid")])
@pytest.mark.parametrize(
    "gate_weight, top_k",
    [("prob", 1), ("prob", 2), ("renormalised", 2), ("renormalised", 1)]
    + [("straight-through", 1), ("straight-through", 2)],
)
def test_gradients(gate_weight, top_k, gate, activation, route):
    """Of gate, alpha and LoRA: equal to finite differences, and to those of the plain loops. For
    the straight-through gate the loops are the surrogate, since its differences are zero."""
    model = molex_model(
        "llama", T=3, d_model=8, gate=gate, activation=activation, route=route, top_k=top_k,
        gate_weight=gate_weight, learn_alpha=True, individual_gates=True,
    ).double().train()  # fmt: skip
    parameters = trained(model)
    assert len(parameters) == 3 * 4 + 3 * (2 if gate == "linear" else 3) + 1
    logits, balance, routes = run(model, SEQUENCES)
    gradient = torch.autograd.grad(loss_of(logits, balance), parameters.values())
    expected = torch.autograd.grad(
        loss_of(*by_hand(model, SEQUENCES)[:2]), parameters.values(), allow_unused=True
    )
    for name, g, e in zip(parameters, gradient, expected, strict=True):
        assert g.abs().max() > 1e-6, name
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n} {m}")
    if (gate_weight, top_k) == ("straight-through", 1):
        return
    step = 1e-5
    for (name, p), g in zip(parameters.items(), gradient, strict=True):
        direction, values = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * step * direction
                logits, balance, moved = run(model, SEQUENCES)
                p -= sign * step * direction
            assert moved == routes, "the step has turned a vote; take another seed"
            values.append(loss_of(logits, balance))
        slope = ((values[0] - values[1]) / (2 * step)).item()
        assert slope == pytest.approx((g * direction).sum().item(), rel=1e-5, abs=1e-7), name


def test_the_straight_through_gradient_adds_nothing_to_the_value():
    """The weights of K = 1 are exactly 1, and yet the task's loss reaches the gate."""
    model = molex_model("gpt2", alpha=0.5, gate_weight="straight-through").train()
    sharp, _, _ = run(model, SEQUENCES)
    gate = model.layers.gates[0]
    torch.cat(sharp).square().sum().backward()
    assert gate.weight.grad.abs().max() > 1e-3
    with torch.no_grad():
        gate.weight /= 4  # less sure, but the order stays: the same votes, the same output
        gate.bias /= 4
        dull, _, _ = run(model, SEQUENCES)
    for x, y in zip(dull, sharp, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("gate", ["linear", "cosine"])
def test_with_one_layer_load_balance_alone_teaches_the_gate(gate):
    """Eq. 4 as it stands: the weight of K = 1 is 1, so the task has no gradient to the gate."""
    model = molex_model("gpt2", gate=gate, alpha=0.5, learn_alpha=True).train()
    logits, balance, _ = run(model, SEQUENCES)
    torch.cat(logits).square().sum().backward(retain_graph=True)
    gates = dict(model.layers.gates.named_parameters())
    assert all(p.grad is None for p in gates.values())
    assert model.layers.alpha_logit.grad.abs().max() > 1e-3
    balance.backward()
    assert all(p.grad.abs().max() > 0 for p in gates.values())


def test_the_linear_gate_starts_as_the_models_layers_do():
    torch.manual_seed(0)
    gate = GATES["linear"](1024, 24, MoLExConfig())
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert gate.weight.mean().abs() < 5e-4 and not gate.bias.any()


# ---------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_decoding_equals_uncached(family, route, top_k):
    """Prompts at once, then token by token, while rows are repeated, reordered and dropped."""
    model = molex_model(family, T=5, route=route, top_k=top_k, alpha=0.5).double()
    dice = random.Random(5)
    prompts = [[dice.randrange(VOCAB) for _ in range(n)] for n in (5, 2, 7, 4)]

    def uncached(origin: int, answer: list[int]) -> Tensor:
        """Logits after prompt and answer, in the company of the other prompts."""
        batch = [(p + answer if i == origin else p, len(p)) for i, p in enumerate(prompts)]
        return run(model, batch)[0][origin][-1]

    ids, mask, _ = pad([(p, len(p)) for p in prompts], left=True)
    cache, origin, answers = Cache(), [0, 1, 2, 3], [[] for _ in prompts]
    with torch.no_grad():
        logits = model(ids, mask, cache=cache)[:, -1]
        chosen = {t: picks.tolist() for t, picks in cache.route.items()}
        if route == "sequence":
            assert sum(len({str(p) for p in picks}) > 1 for picks in chosen.values()) > 1
        for index in ([0, 1, 2, 3], [2, 2, 0, 1, 1, 1, 3], [6, 0, 2, 5], [3, 3, 1, 0], [1], [0, 0]):
            cache.select(torch.tensor(index))
            logits, origin = logits[index], [origin[i] for i in index]
            answers = [[*answers[i], dice.randrange(VOCAB)] for i in index]
            logits = model(torch.tensor([a[-1:] for a in answers]), cache=cache)[:, -1]
            for row, (o, answer) in enumerate(zip(origin, answers, strict=True)):
                torch.testing.assert_close(logits[row], uncached(o, answer), rtol=0, atol=1e-10)
                for t, picks in cache.route.items():
                    held = picks[row if len(picks) > 1 else 0].tolist()
                    assert held == (chosen[t][o] if len(chosen[t]) > 1 else chosen[t][0])


# ------------------------------------------------------------------------------- what is in a model


@pytest.mark.parametrize("gate", ["linear", "cosine"])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("layers, slots", [(None, 4), ((0, 2), 2)])
def test_upcycling_shares_layers_and_adds_the_gate_alone(gate, individual, layers, slots):
    before = lora_model("gpt2").state_dict()
    config = MoLExConfig(
        gate=gate, proj_dim=6, individual_gates=individual, learn_alpha=True, layers=layers
    )
    model = upcycle(lora_model("gpt2"), config)
    after = model.state_dict()
    new = after.keys() - before.keys()
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert len({w.untyped_storage().data_ptr() for w in after.values()}) == len(after)

    T, D, copies = 4, 16, slots if individual else 1
    one = T * D + T if gate == "linear" else 6 * D + T * 6 + 1
    assert sum(after[n].numel() for n in new) == copies * (one + 1)  # and an alpha
    assert all(p.requires_grad for n, p in model.named_parameters() if n in new)
    assert torch.allclose(model.layers.alpha_logit.sigmoid(), torch.tensor(0.95))


def test_table_14s_parameters():
    """Llama-3.2-1B with LoRA r = 8, and 16 x 2048 + 16 more with MoLEx."""
    config = Config(
        family="llama", **family_flags("llama"),
        vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, d_model=2048,
        d_head=64, d_ff=8192, max_positions=131072, norm_eps=1e-5, activation="silu", tied=True,
        bias=False, rope=dict(rope_theta=500000.0, rope_type="default"),
    )  # fmt: skip
    count = lambda model: (  # noqa: E731
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    for learn_alpha in (False, True):
        with torch.device("meta"):
            model = add_lora(Transformer(config), r=8, alpha=16)
            assert count(model) == (1_236_666_368, 851_968)
            upcycle(model, MoLExConfig(learn_alpha=learn_alpha))
        more = 32_784 + learn_alpha
        assert count(model) == (1_236_666_368 + more, 851_968 + more)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gate="quadratic"), "gate is 'quadratic', not linear or cosine"),
        (dict(activation="tanh"), "activation is 'tanh', not softmax or sigmoid"),
        (dict(vote="median"), "vote is 'median', not mode or mean"),
        (dict(gate_weight="one"), "is 'one', not renormalised or straight-through or prob"),
        (dict(route="token"), "route is 'token', not batch or sequence"),
        (dict(top_k=0), "top-k cannot be 0"),
        (dict(top_k=5), "top-k is 5, but the model has 4 layers"),
        (dict(layers=tuple(range(12))), "layers 0-11 are to mix, but the model has layers 0-3"),
        (dict(layers=()), "no slot is to mix"),
        (dict(borrow_size="half"), "borrow-size is 'half', not as-is or own"),
        (dict(layers=(-1, 2)), "layers -1-2 are to mix"),
        (dict(layers=[0, 2.0]), "layers 0-2.0 are to mix"),
        (dict(layers=[0, True]), "layers 0-True are to mix"),
        (dict(alpha=1.01), "alpha is 1.01, not between 0 and 1"),
        (dict(alpha=-0.1), "alpha cannot be -0.1"),
        (dict(alpha=math.nan), "alpha cannot be nan"),
        (dict(alpha=1.0, learn_alpha=True), "alpha is 1.0, not between 0 and 1"),
        (dict(alpha=0.0, learn_alpha=True), "alpha is 0.0, not between 0 and 1"),
        (dict(on_device=True, route="sequence"), "on-device needs one choice for the batch"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(InputError, match=message):
        upcycle(lora_model("gpt2"), MoLExConfig(**options))


def test_the_summary_tells_what_the_gate_did_in_training():
    model = molex_model("gpt2", individual_gates=True).train()
    first = [[9.0, 8, 7, 6], [9, 7, 8, 6], [6, 7, 8, 9], [8, 6, 7, 9]]  # layers 0, 0, 3, 3
    second = [*first[:2], [9.0, 7, 8, 6], first[3]]  # slot 2 takes 0 for 3
    balances = []
    for biases in (first, second):
        gate_to(model, biases)
        balances.append(run(model, SEQUENCES)[1].item())
    best = torch.tensor(first + second).softmax(-1).amax(-1)
    found = model.layers.routes.summary()
    assert found["changed"] == 1 / 8 and found["own"] == 4 / 8 and model.layers.mean_alpha() == 0.95
    assert found["affinity"] == pytest.approx(best.mean().item())
    assert found["balance"] == pytest.approx(sum(balances) / 2)
    run(model.eval(), SEQUENCES)
    assert model.layers.routes.summary() == dict(changed=0, own=0, affinity=0, balance=0)
    gate_to(model.train(), first)
    run(model, SEQUENCES)
    assert model.layers.routes.summary()["changed"] == 1 / 4  # the last batch is remembered


def test_the_summary_where_each_sequence_decides():
    model = molex_model("gpt2", individual_gates=True, route="sequence", alpha=0.5).train()
    _, balance, routes = run(model, SEQUENCES)
    picks = [(t, j) for t, chosen in routes.items() for (j,) in chosen]
    found = model.layers.routes.summary()
    assert found["own"] == pytest.approx(sum(t == j for t, j in picks) / len(picks))
    assert found["balance"] == pytest.approx(balance.item()) and found["affinity"] > 0
    assert "changed" not in found  # there is no choice of the batch before


def test_a_model_can_be_copied_after_a_training_pass():
    model = molex_model("gpt2").train()
    before = run(model, SEQUENCES)[0]
    twin = copy.deepcopy(model)
    assert model.layers.load_balance is not None and twin.layers.load_balance is None
    for x, y in zip(before, run(twin, SEQUENCES)[0], strict=True):
        assert torch.equal(x, y)


# ----------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("gate", ["linear", "cosine"])
def test_under_autocast_the_gate_scores_in_float32(gate):
    model = molex_model("gpt2", gate=gate, top_k=2, route="sequence").train()
    seen = []
    model.layers.gates[0].register_forward_hook(
        lambda module, args, out: seen.append((args[0].detach(), out.detach()))
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits, balance, _ = run(model, SEQUENCES)
        loss = loss_of([x.float() for x in logits], balance)
    loss.backward()
    assert logits[0].dtype == torch.bfloat16 and balance.dtype == torch.float32
    scored = list(seen)
    assert len(scored) == 4
    for z, scores in scored:
        assert z.dtype == scores.dtype == torch.float32
        assert torch.equal(model.layers.gates[0](z), scores)
    assert all(p.grad.isfinite().all() for p in trained(model).values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_near_float32_in_every_family(family, device):
    """Logits and gradients of a step, and, but for encoders, what an answer is worth."""
    model = molex_model(family, T=6, d_model=64, individual_gates=True)
    gate_to(model, torch.eye(6).roll(2, 0).mul(9).tolist())  # so that rounding turns no vote
    ids, mask, prompt = pad(SEQUENCES)
    found = {}
    for precision in ("float32", "bf16"):  # in this order: casting the frozen weights loses digits
        model.to(device if precision == "bf16" else "cpu").train()
        model.precision = precision
        model.cast_frozen()
        model.zero_grad()
        with model.autocast():
            logits = model(*(x.to(model.device) for x in (ids, mask, prompt)))[mask].cpu().float()
        loss_of(list(logits), model.layers.load_balance.cpu()).backward()
        gradient = torch.cat([p.grad.cpu().flatten() for n, p in trained(model).items()])
        found[precision] = logits.detach(), gradient
    (exact, gradient), (rounded, other) = found.values()
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * exact.abs().max().item())
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.99
    if family == "roberta":
        return
    prompts = [ids for ids, _ in SEQUENCES]
    answers = []
    for precision in ("bf16", "float32"):
        model.to("cpu" if precision == "float32" else device).float().eval()
        model.precision = precision
        with model.autocast():
            answers.append(beam_search(model, prompts, 0, 4, max_new_tokens=8))
    for prompt, rounded, exact in zip(prompts, *answers, strict=True):
        worth = []
        for answer in (rounded, exact):
            text = torch.tensor([[*prompt, *answer, 0][: len(prompt) + 8]])
            first = torch.arange(text.shape[1]) < len(prompt)
            log_p = model(text, prompt=first[None])[0].log_softmax(-1)
            new = range(len(prompt), text.shape[1])
            worth.append(sum(log_p[i - 1, text[0, i]] for i in new) / len(new) ** 0.9)
        assert worth[0] > worth[1] - 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upcycled", ["first", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_can_be_cast_before_and_after(family, upcycled, dtype):
    """With .half() and the like, as a whole: a step, and for a decoder an answer."""
    options = dict(learn_alpha=True, individual_gates=True, top_k=2, gate_weight="prob")
    exact = molex_model(family, **options).train()
    gate_to(exact, torch.eye(4).roll(2, 0).mul(9).tolist())  # so that rounding turns no vote
    model = copy.deepcopy(exact).to(dtype)
    if upcycled == "last":
        model = lora_model(family).to(dtype).train()
        upcycle(model, exact.layers.config).load_state_dict(exact.state_dict())
    logits, _, routes = run(model, SEQUENCES)
    expected, _, same = run(exact, SEQUENCES)
    assert routes == same
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    for x, y in zip(logits, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), y, rtol=0, atol=tolerance * y.abs().max().item())
    loss_of(logits, model.layers.load_balance).backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())
    z = torch.zeros(1, 2, 16, dtype=dtype)  # rounded to bfloat16 half of a new gate's scores tie
    exactly = torch.promote_types(model.layers.gates[0].weight.dtype, torch.float32)
    assert model.layers.log_affinity(0, z).dtype == exactly
    if family != "roberta":
        assert len(beam_search(model.eval(), [SEQUENCES[0][0]], 0, 4, max_new_tokens=8)[0]) > 0


def test_upcycling_leaves_the_layers_in_their_precision():
    model = lora_model("gpt2")
    model.precision = "bf16"
    model.cast_frozen()
    before = {name: p.dtype for name, p in model.layers.blocks.named_parameters()}
    assert {*before.values()} == {torch.float32, torch.bfloat16}
    upcycle(model)
    assert {name: p.dtype for name, p in model.layers.blocks.named_parameters()} == before


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate_weight", ["renormalised", "straight-through", "prob"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_extreme_scores_stay_finite(activation, gate_weight, top_k, route):
    model = molex_model(
        "gpt2", activation=activation, gate_weight=gate_weight, top_k=top_k, route=route
    ).train()
    with torch.no_grad():  # most tokens find the layers that the others chose impossible
        gate = model.layers.gates[0]
        gate.weight *= 1e4 / (gate.weight.norm(dim=1, keepdim=True) * 4)
        gate.bias.copy_(torch.tensor([-1e4, 0.0, 1e4, 3.0]))
    logits, balance, _ = run(model, SEQUENCES)
    loss = loss_of(logits, balance)
    loss.backward()
    assert loss.isfinite()
    for name, p in trained(model).items():
        assert p.grad.isfinite().all(), name


# --------------------------------------------------------------------------------- data parallelism

SHARES = {"halves": (slice(0, 2), slice(2, 4)), "nothing": (slice(0, 4), slice(4, 4))}
PARALLEL = [
    ("gpt2", dict(), "halves"),
    ("gpt2", dict(vote="mean", top_k=2, gate="cosine"), "halves"),
    ("llama", dict(vote="mean", activation="sigmoid", learn_alpha=True), "nothing"),
    ("roberta", dict(top_k=3, gate_weight="prob", individual_gates=True), "halves"),
    ("gpt2", dict(route="sequence"), "halves"),
    ("llama", dict(route="on device", top_k=2), "halves"),
]


def parallel_batch(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Four prompts with answers, padded alike whoever has them. A share of nothing is one sequence
    of padding, as data.collate makes it."""
    dice = random.Random(11)
    sequences = [([dice.randrange(2, VOCAB) for _ in range(n)], n - 2) for n in (9, 4, 6, 8)]
    ids, mask, prompt = pad(sequences)
    ids = torch.where(mask, ids, 0)
    if rows.start == rows.stop:
        return ids[:1], torch.zeros_like(mask[:1]), torch.zeros_like(mask[:1])
    return ids[rows], mask[rows], prompt[rows]


def train_step(family: str, options: dict, rows: slice) -> dict:
    """Votes, load balance and gradients of some of the sequences."""
    model = molex_model(family, alpha=0.5, **options).train()
    ids, mask, prompt = parallel_batch(rows)
    with Spy(model) as spy:
        logits = model(ids, mask, prompt)
    balance = model.layers.load_balance
    (logits[mask].square().sum() / 100 + balance).backward()
    return dict(
        routes=spy.routes,
        balance=balance.item(),
        counts=model.layers.routes.counts,
        gradients={n: p.grad for n, p in trained(model).items()},
    )


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    steps = [train_step(family, o, SHARES[share][rank]) for family, o, share in PARALLEL]
    torch.save(steps, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_decide_and_learn_what_one_would(tmp_path):
    torch.multiprocessing.spawn(one_rank, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (family, options, share), first, second in zip(PARALLEL, *ranks, strict=True):
        whole = train_step(family, options, slice(0, 4))
        for t, picks in whole["routes"].items():
            ours = [first["routes"][t], second["routes"][t]]
            if share == "nothing":
                assert ours == [picks, picks[:1]]
            else:
                assert ours[0] + ours[1] == picks
        assert first["balance"] + second["balance"] == pytest.approx(whole["balance"], abs=1e-5)
        if share == "halves":
            assert torch.equal(first["counts"] + second["counts"], whole["counts"])
        for name, gradient in whole["gradients"].items():
            both = first["gradients"][name] + second["gradients"][name]
            torch.testing.assert_close(both, gradient, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- CUDA


def step_on(model: Transformer, batch: tuple, device: str) -> list[Tensor]:
    """Logits, load balance and gradients, on the CPU."""
    model.to(device).train().zero_grad()
    ids, mask, prompt = (x.to(device) for x in batch)
    logits = model(ids, mask, prompt)
    (logits[mask].square().mean() + model.layers.load_balance).backward()
    out = [logits[mask], model.layers.load_balance, *(p.grad for p in trained(model).values())]
    return [x.detach().cpu() for x in out]


def decode_on(model: Transformer, batch: tuple, device: str) -> list[Tensor]:
    """The logits of eight cached steps, with the rows reversed before each."""
    model.to(device).eval()
    ids, mask, _ = (x.to(device) for x in batch)
    cache, out = Cache(), []
    with torch.no_grad():
        out.append(model(ids, mask, cache=cache)[:, -1])
        for step in range(8):
            cache.select(torch.arange(len(ids) - 1, -1, -1, device=device))
            out.append(model(ids[:, step : step + 1], cache=cache)[:, -1])
    return [x.cpu() for x in out]


@pytest.fixture
def late_streams(monkeypatch):
    """Each of the two streams is now and then late by up to a millisecond, after `fork` and before
    `join`, so that a missing wait shows."""
    dice = random.Random()

    def late(side: torch.cuda.Stream | None) -> None:
        for stream in (torch.cuda.current_stream(), side) if side else ():
            if dice.random() < 0.3:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(dice.randrange(2_000_000))

    def late_fork(z: Tensor) -> torch.cuda.Stream | None:
        side = fork(z)
        late(side)
        return side

    def late_join(side: torch.cuda.Stream | None, outputs: list) -> None:
        late(side)
        join(side, outputs)

    monkeypatch.setattr("molex.fork", late_fork)
    monkeypatch.setattr("molex.join", late_join)


@NEEDS_CUDA
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_two_streams_on_cuda_equal_the_cpu(late_streams, route, top_k, device="cuda"):
    """Many times over, with tensors large enough for a missing wait to show."""
    dice = random.Random(13)
    batches = [
        pad([([dice.randrange(2, VOCAB) for _ in range(n)], n // 2) for n in lengths], left=True)
        for lengths in (
            [200, 120, 160, 80, 200, 40, 199, 100],
            [30, 90, 150, 210, 60, 120, 180, 10],
        )
    ]
    model = molex_model("gpt2", T=6, d_model=256, route=route, top_k=top_k, alpha=0.5)
    model.double()  # rounding, which differs between devices, must not turn a vote
    for work in (step_on, decode_on):
        expected = [work(model, batch, "cpu") for batch in batches]
        for repeat in range(20):
            got = work(model, batches[repeat % 2], device)
            for x, y in zip(got, expected[repeat % 2], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * y.abs().max().item())
