"""experiments/as_published.py against plain loops over what the authors' code is said to do."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call
from test_molex import VOCAB, lora_model

import eval as evaluation
import train
from data import Example, collate
from experiments import as_published, padding_votes
from experiments.as_published import as_script, padded_collate, publish
from experiments.padding_votes import whose_route
from model import Cache, Config, Transformer
from molex import MoLExConfig
from support.files import InputError
from support.settings import paper_settings

CONFIGS = [
    dict(alpha=0.6),
    dict(vote="mean", individual_gates=True, layers=(0, 2)),
    dict(vote="mean", activation="sigmoid", learn_alpha=True, individual_gates=True),
    dict(gate="cosine", proj_dim=5, learn_alpha=True),
    dict(gate="cosine", proj_dim=5, vote="mean", alpha=0.5),
]


def published_model(family: str, **options) -> Transformer:
    """In float64, with gates and alphas that all differ, so decisive that routes do, too."""
    model = publish(lora_model(family, 4, 16), MoLExConfig(**options)).double()
    torch.manual_seed(4)
    with torch.no_grad():
        for gate in model.layers.gates:
            for p in gate.parameters():
                p += (2.0 if p.dim() > 1 else 0.1) * torch.randn_like(p)
    return model


def batch_of(family: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Texts of 7, 3 and 5 tokens padded to 9: ids, and the mask where padding is no key."""
    lengths = torch.tensor([7, 3, 5])
    mask = torch.arange(9) < lengths[:, None]
    torch.manual_seed(seed)
    ids = torch.randint(2, VOCAB, (3, 9)).masked_fill(~mask, 0 if family == "gpt2" else 1)
    return ids, None if family == "gpt2" else mask


def by_hand(model: Transformer, z: torch.Tensor, ctx) -> tuple[torch.Tensor, list[int], float]:
    """The states after the layers, the layer that joined each slot, the sum of load balance."""
    layers, c = model.layers, model.layers.config
    T, routes, balance = len(layers.blocks), [], 0.0
    for t, block in enumerate(layers.blocks):
        own = block(z, ctx, (t, t))
        if t not in (range(T) if c.layers is None else c.layers):
            z = own
            continue
        gate = layers.gates[list(layers.slots).index(t) if c.individual_gates else 0]
        if c.gate == "linear":
            scores = z @ gate.weight.T + gate.bias
        else:
            p = z @ gate.project.weight.T + gate.project.bias
            p = p / p.norm(dim=1, keepdim=True)  # over the sequence
            e = gate.layer / gate.layer.norm(dim=0)
            scores = p @ e * gate.log_temperature.exp().clamp(max=100)
        votes = [0.0] * T
        for row in scores.reshape(-1, T):
            a = row.sigmoid() if c.activation == "sigmoid" else row.exp() / row.exp().sum()
            for j in range(T):
                votes[j] += a[j].item() if c.vote == "mean" else float(row.argmax() == j)
        j = votes.index(max(votes))  # the first of equals
        routes.append(j)
        balance = balance + T * (scores.exp() / scores.exp().sum(-1, keepdim=True))[..., j].mean()
        alpha = c.alpha
        if c.learn_alpha:
            main, other = gate.mixing.exp()
            alpha = main / (main + other)
        z = alpha * own + (1 - alpha) * layers.blocks[j](z, ctx, (t, "other"))
    return z, routes, balance


def compare(model: Transformer, ids, mask) -> tuple:
    """Run the model, and by hand: ((states, routes, balance), the same by hand)."""
    seen = {}

    def note(layers, args, out):
        seen.update(z=args[0], ctx=args[1], out=out)

    routes = []
    elect = model.layers.elect
    model.layers.elect = lambda t, z: routes.append(elect(t, z)) or routes[-1]
    handle = model.layers.register_forward_hook(note)
    model.hidden(ids, mask)
    handle.remove()
    del model.layers.elect
    ours = (seen["out"], routes, model.layers.load_balance)
    return ours, by_hand(model, seen["z"], seen["ctx"])


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
@pytest.mark.parametrize("options", CONFIGS)
def test_states_routes_and_load_balance_are_the_plain_loops(options, family):
    model = published_model(family, **options).train()
    gates = [p for n, p in model.layers.gates.named_parameters() if "mixing" not in n]
    seen = set()
    for seed in range(6):
        model.layers.routes.counts.zero_()
        (out, routes, balance), (z, expected, hand) = compare(model, *batch_of(family, seed))
        assert routes == expected
        torch.testing.assert_close(out, z)
        torch.testing.assert_close(balance, hand)
        shares = model.layers.routes.shares()
        assert [shares[t].argmax().item() for t in model.layers.slots] == routes
        ours = torch.autograd.grad(balance, gates, retain_graph=True)
        theirs = torch.autograd.grad(hand, gates, retain_graph=True)
        for g, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(g, e)
        assert max(g.abs().max() for g in ours) > 1e-3
        seen |= set(routes)
    assert len(seen) > 1
    task = torch.autograd.grad(out.square().sum(), gates, allow_unused=True)
    if options.get("layers") is None and not options.get("individual_gates"):
        assert all(g is None for g in task)  # the task teaches the gate nothing


def test_all_padding_of_a_roberta_has_one_state_and_a_gpt2s_has_not():
    for family, one in (("roberta", True), ("gpt2", False)):
        h = published_model(family).eval().hidden(*batch_of(family))
        assert torch.allclose(h[1, 3:], h[1, 3].expand(6, -1)) == one


@pytest.mark.parametrize("options", [dict(alpha=0.6), dict(learn_alpha=True, vote="mean")])
@torch.no_grad()
def test_decoding_reads_the_mean_of_both_layers_keys_and_votes_anew(options):
    """A prompt of 5 tokens, then four more, one at a time, beside loops with one cache a slot."""
    model = published_model("gpt2", **options).eval()
    ids = batch_of("gpt2")[0][:2]
    cache, routes, elect = Cache(), [], model.layers.elect
    model.layers.elect = lambda t, z: routes.append(elect(t, z)) or routes[-1]
    outputs = [model.hidden(ids[:, :5], cache=cache)]
    outputs += [model.hidden(ids[:, n : n + 1], cache=cache) for n in range(5, 9)]
    chosen = [routes[i : i + 4] for i in range(0, 20, 4)]
    del model.layers.elect

    def attention(block, x, keys):
        attn, (B, N, _) = block.attn, x.shape
        q, k, v = (
            f(x).view(B, N, attn.n_head, attn.d_head).transpose(1, 2)
            for f in (attn.q, attn.k, attn.v)
        )
        K = torch.cat([keys[0], k], 2) if keys else k
        V = torch.cat([keys[1], v], 2) if keys else v
        scores = q @ K.transpose(2, 3) / attn.d_head**0.5
        S = K.shape[2]
        later = torch.arange(S) > torch.arange(S - N, S)[:, None]
        y = scores.masked_fill(later, -torch.inf).softmax(-1) @ V
        return attn.o(y.transpose(1, 2).reshape(B, N, -1)), (k, v)

    def layer(block, z, keys):
        update, new = attention(block, block.norm1(z), keys)
        z = z + update
        return z + block.mlp(block.norm2(z)), new

    past: list = [None] * 4
    for step, (first, last) in enumerate([(0, 5), (5, 6), (6, 7), (7, 8), (8, 9)]):
        z = model.embed.weight[ids[:, first:last]] + model.positions.weight[first:last]
        for t in range(4):
            j, alpha = chosen[step][t], float(model.layers.alpha(t))
            assert j == model.layers.elect(t, z)
            own, new = layer(model.layers.blocks[t], z, past[t])
            other, more = layer(model.layers.blocks[j], z, past[t])
            mixed = [alpha * a + (1 - alpha) * b for a, b in zip(new, more, strict=True)]
            old = past[t] or [x[:, :, :0] for x in mixed]
            past[t] = [torch.cat(pair, 2) for pair in zip(old, mixed, strict=True)]
            z = alpha * own + (1 - alpha) * other
        torch.testing.assert_close(outputs[step], model.norm(z))
    assert len({tuple(route) for route in chosen}) > 1  # the votes were not held


def test_padding_keeps_what_is_predicted_where():
    config = lora_model("gpt2", 2, 16).config
    examples = [Example([5, 6, 7], [8, 9]), Example([4], [3])]
    short, wide = collate(examples), padded_collate(config, 11)(examples)
    assert wide.ids.shape == (2, 11) and wide.mask.all() and not wide.ids[0, 5:].any()
    places = short.ids.flatten()[short.where], wide.ids.flatten()[wide.where]
    assert torch.equal(*places) and torch.equal(short.target, wide.target)
    labelled = [Example([5, 6, 7], label=1), Example([4], label=0)]
    wide = padded_collate(lora_model("roberta", 2, 16).config, 6)(labelled)
    assert wide.ids.tolist() == [[5, 6, 7, 1, 1, 1], [4, 1, 1, 1, 1, 1]]
    assert wide.mask.sum() == 4 and wide.where.tolist() == [0, 1]


@pytest.mark.parametrize(
    "task, known",
    [
        ("cola", dict(batch_size=64, accumulate=2, gate_lr=5e-5, gate_weight_decay=0.0)),
        ("rte", dict(batch_size=256, accumulate=8, gate_lr=0.1, gate_weight_decay=0.1)),
        ("mrpc", dict(load_balance=0.0, warmup=0.1)),
        ("stsb", dict(load_balance=0.001)),
    ],
)
def test_the_scripts_settings(task, known):
    s = train.parse("--model nano/roberta --task cola".split())[1][-1]
    found = paper_settings("roberta-base", task)[0]
    gate = {name: found.pop(name) for name in found.keys() & vars(s.molex).keys()}
    s = replace(s, task=task, shape="roberta-base", molex=replace(s.molex, **gate), **found)
    s = as_script(s)
    assert s.max_length == 256  # all that nano/roberta has
    assert {name: getattr(s, name) for name in known} == known
    assert (s.lora_alpha, s.eval_batch, s.molex.vote) == (16.0, 8, "mode")
    assert s.molex.learn_alpha == (task == "mrpc")
    assert s.molex.alpha == (0.95 if task == "cola" else 0.5)


def test_the_small_form_prints_the_three_beside_each_other(tmp_path, capsys, failure):
    flags = "--model nano/roberta --task mrpc --max-steps 2 --dev-limit 40".split()
    call(as_published, *flags, "--out", tmp_path)
    said = capsys.readouterr().out
    line = next(x for x in said.splitlines() if x.startswith("MRPC accuracy"))
    runs = ["nano-roberta-mrpc-lora-s0", "nano-roberta-mrpc-molex-s0"]
    runs.append("as-published/nano-roberta-mrpc-molex-s0")
    scores = [json.loads((tmp_path / r / "scores.json").read_text())["accuracy"] for r in runs]
    assert [float(x) for x in re.findall(r"\d+\.\d+", line)] == [round(100 * x, 2) for x in scores]
    assert "mrpc: learn_alpha" not in said and "mrpc: warmup 0.1" in said
    call(as_published, *flags, "--out", tmp_path)  # everything is kept
    assert capsys.readouterr().out.count("finished before, kept") == 2
    ours, published = tmp_path / runs[1], tmp_path / runs[2]
    before = (published / "scores.json").read_bytes()
    for run in runs:  # what is there of other settings is noticed before anything is trained
        away = (tmp_path / run).rename(tmp_path / "away")
        error = failure(call, as_published, *flags, "--lr", "0.5", "--out", tmp_path)
        assert re.search(r"with another lr(, \w+)*; take another --out, or remove it", error)
        assert not (tmp_path / run).exists()
        away.rename(tmp_path / run)
    for run in runs:
        scores = (tmp_path / run / "scores.json").read_bytes()
        (tmp_path / run / "scores.json").write_text("{}")
        error = failure(call, as_published, *flags, "--out", tmp_path)
        assert f"{run}/scores.json lacks" in error
        (tmp_path / run / "scores.json").write_bytes(scores)
    error = failure(call, evaluation, published)
    assert f"{published} is a run of Published, not of MoLEx" in error
    assert (published / "scores.json").read_bytes() == before
    for other, layers in ((ours, "MoLEx"), (tmp_path / runs[0], "Layers")):
        error = failure(call, padding_votes, other)
        assert f"{other} is a run of {layers}, not of Published" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model nano/roberta --task cola --pad 20", "--pad is 20, but the longest text has 56"),
        ("--model nano/gpt2 --pad 250", "--pad is 250, but the model has room for 192 tokens"),
        ("--model nano/gpt2 --task cola --data nano/glue", "E2E with GPT-2, GLUE with RoBERTa"),
        ("--model nano/gpt2 --on-device", "as published there is no --on-device"),
        ("--model nano/gpt2 --route sequence", "there is no --route"),
        ("--model nano/gpt2 --borrow-size own", "there is no --borrow-size"),
        ("--fresh", "--fresh is not heeded here"),
    ],
)
def test_bad_input(flags, message, failure, tmp_path):
    assert message in failure(call, as_published, *flags.split(), "--out", tmp_path)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_without_a_flag_of_training_it_is_the_small_form_in_a_folder_of_its_own(
    tmp_path, monkeypatch
):
    small = "--max-steps 1 --batch-size 2 --test-limit 1 --beams 1 --max-new-tokens 1".split()
    monkeypatch.setattr(as_published, "SMALL", [*small, "--train-limit", "4"])
    monkeypatch.chdir(tmp_path)
    call(as_published, "--device", "cpu")
    runs = {file.parent for file in Path().rglob("config.json")}
    names = (
        "as-published/nano-gpt2-e2e-molex-s0",
        "nano-gpt2-e2e-molex-s0",
        "nano-gpt2-e2e-lora-s0",
    )
    assert runs == {Path("runs/as-published/small") / name for name in names}


def test_it_starts_from_no_other_run():
    s = replace(train.parse("--model nano/roberta --task cola".split())[1][-1], init="runs/x")
    with pytest.raises(InputError, match="no --init-from"):
        as_script(s)


def test_a_vote_that_a_fork_has_added_is_refused():
    config = Config.load("nano/gpt2")
    with pytest.raises(InputError, match="as published there is no --vote median"):
        as_published.check(config, MoLExConfig(vote="median"))


def test_a_llama_is_refused():
    with pytest.raises(InputError, match="GPT-2 and RoBERTa, and no Llama"):
        publish(lora_model("llama", 2, 16), MoLExConfig())


@pytest.mark.parametrize("vote", ["mode", "mean"])
@torch.no_grad()
def test_whose_route_it_is(vote):
    """Counted position by position: the shares of padding's votes, and of routes that are its."""
    model = published_model("roberta", vote=vote, individual_gates=True).eval()
    torch.manual_seed(7)
    lengths = [3, 8, 5, 2, 6]
    examples = [Example(torch.randint(2, VOCAB, (n,)).tolist(), label=0) for n in lengths]
    padding, its, texts, decisions = whose_route(model, examples, 2, 9)
    assert padding == pytest.approx(100 * (1 - sum(lengths) / (9 * 5)))
    assert decisions == 4 * 3
    same = {"padding": 0, "text": 0}
    for start in (0, 2, 4):
        part = examples[start : start + 2]
        batch = padded_collate(model.config, 9)(part)
        states, elect = [], model.layers.elect
        model.layers.elect = lambda t, z, e=elect, s=states: s.append(z) or e(t, z)
        model.hidden(batch.ids, batch.mask)
        del model.layers.elect
        for gate, z in zip(model.layers.gates, states, strict=True):
            votes = {"all": [0.0] * 4, "padding": [0.0] * 4, "text": [0.0] * 4}
            for i, e in enumerate(part):
                for n in range(9):
                    a = (gate.weight @ z[i, n] + gate.bias).softmax(0).tolist()
                    for who in ("all", "text" if n < len(e) else "padding"):
                        for j in range(4):
                            votes[who][j] += a[j] if vote == "mean" else a[j] == max(a)
            winner = {who: v.index(max(v)) for who, v in votes.items()}
            for who in same:
                same[who] += winner[who] == winner["all"]
    assert (its, texts) == pytest.approx((100 * same["padding"] / 12, 100 * same["text"] / 12))
    assert its != texts


def test_padding_votes_reads_a_run(tmp_path, monkeypatch, capsys, failure):
    monkeypatch.chdir(tmp_path)
    call(padding_votes)
    line = capsys.readouterr().out.splitlines()[-1]
    found = [float(x) for x in re.findall(r"([\d.]+) %", line)]
    assert line.startswith("nano/roberta, CoLA, seed 0") and len(found) == 3
    assert 85 < found[0] < 92  # 28 of 256 tokens are text
    folder = "runs/padding-votes/nano-roberta-cola-molex-s0"
    call(padding_votes, folder)
    assert capsys.readouterr().out.splitlines()[-1] == line
    with pytest.raises(InputError):
        call(padding_votes, folder, tmp_path)
    assert not capsys.readouterr().out  # no head of a table that does not come
    assert "finished epoch" in failure(call, padding_votes, tmp_path)
