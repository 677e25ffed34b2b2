"""MoLEx: every layer of a pretrained model also runs one more, picked by a gate (section 2.2).

    z_{t+1} = z_t + alpha u_t(z_t) + (1 - alpha) sum_j w_j u_j(z_t)                         (Eq. 4)

u_j(z) = block_j(z) - z is what layer j adds to the hidden state. The place t in the stack is called
a slot. Its own layer t keeps the share alpha = 0.95; the rest goes to the K layers (K = 1) that a
gate has chosen among all T. The paper calls this sparse upcycling (1.1); that usually copies
layers, here they are shared: the only new parameters are the gate's and, if it is learned, alpha.

    upcycle(add_lora(load("gpt2-medium"), r=4, alpha=32), MoLExConfig(layers=tuple(range(12))))
    python molex.py                     one sentence's way through nano/gpt2, slot by slot

`MoLEx` takes the place of model.py's `Layers`; nothing else changes. What Eq. 4 leaves open:

- Every token scores every layer, but then one decision holds for the whole batch ("batch routing",
  appendix B.1). With route="sequence" each sequence decides for itself, so that a prediction does
  not depend on what else is in the batch. Padding never votes.
- In a language model only the prompt votes: later tokens must not decide how earlier ones are
  read, and while a text is written they do not exist yet. The decision then stands until the text
  ends, so the cached keys and values stay valid.
"""

import math
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Context, Transformer
from support.cuda import LayerBank, fork, join, share
from support.files import InputError
from support.processes import sum_over_processes
from support.routes import RouteLog
from support.settings import check_fields, setting

# -------------------------------------------------------- what the paper varies, each by its name


def linear_gate(d_model: int, T: int, config: "MoLExConfig") -> nn.Module:
    """g(z) = W z + b, section 2.2: (..., D) -> (..., T). It starts as these models' layers do."""
    gate = nn.Linear(d_model, T)
    nn.init.normal_(gate.weight, std=0.02)
    nn.init.zeros_(gate.bias)
    return gate


class CosineGate(nn.Module):
    """The router of X-MoE (Chi et al., 2022): project z, take the cosine with one learned
    embedding per layer, divide by a learned temperature. (..., D) -> (..., T). MoLEx's own code
    has a bias in the projection, normalises the projected states over the sequence, and multiplies
    by a temperature that starts at 2."""

    def __init__(self, d_model: int, T: int, config: "MoLExConfig") -> None:
        super().__init__()
        self.project = nn.Linear(d_model, config.proj_dim, bias=False)
        self.layer = nn.Parameter(torch.randn(T, config.proj_dim))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.3)))  # a logarithm: stays > 0

    def forward(self, z: Tensor) -> Tensor:
        cosine = F.normalize(self.project(z), dim=-1) @ F.normalize(self.layer, dim=-1).T
        return cosine / self.log_temperature.exp().clamp(min=0.01)


def by_mean(votes: Tensor, affinity: Tensor) -> Tensor:
    """The layers in order of their mean affinity, then of their number: (B, T) -> (B, T)."""
    return affinity.argsort(descending=True, stable=True)  # stable: the lower number first


def by_mode(votes: Tensor, affinity: Tensor) -> Tensor:
    """The layers in order of their votes, then of their mean affinity: (B, T) -> (B, T)."""
    order = by_mean(votes, affinity)
    by_votes = votes.gather(1, order).argsort(descending=True, stable=True)
    return order.gather(1, by_votes)


def renormalised(log_a: Tensor) -> Tensor:
    """a_nj over the sum of the chosen a_n, (B, N, K) -> (B, N, K): Eq. 4 (a reading of it, if they
    are sigmoids). With K = 1 that is 1: load balance alone teaches the gate, not the task."""
    return log_a.softmax(-1) if log_a.shape[-1] > 1 else torch.ones_like(log_a)  # exp(log_a) is a


def straight_through(log_a: Tensor) -> Tensor:
    """The same but that with K = 1 the task teaches the gate, as if the weight were a_nj."""
    a = log_a.exp()
    return renormalised(log_a) + (a - a.detach() if a.shape[-1] == 1 else 0)


def prob(log_a: Tensor) -> Tensor:
    """Appendix B, read as in the Switch Transformer: a_nj itself. The task teaches the gate, and an
    unsure gate makes the second update small."""
    return log_a.exp()


def own_size(u_j: Tensor, u: Tensor) -> Tensor:
    """Not in the paper: u_j, token by token, at the length of u (RESULTS.md). (B, N, D) each."""
    length = u_j.norm(dim=-1, keepdim=True)
    return u_j * (u.norm(dim=-1, keepdim=True) / length.where(length > 0, 1))


GATES = {"linear": linear_gate, "cosine": CosineGate}
LOG_AFFINITIES = {"softmax": nn.LogSoftmax(dim=-1), "sigmoid": F.logsigmoid}
VOTES = {"mode": by_mode, "mean": by_mean}
WEIGHTS = {"renormalised": renormalised, "straight-through": straight_through, "prob": prob}
SIZES = {"as-is": lambda u_j, u: u_j, "own": own_size}


@dataclass(frozen=True)
class MoLExConfig:
    """The gate's settings, as in Tables 5 and 6. The defaults are Table 6's, but for `layers`."""

    gate: str = setting("linear", '"Cos" in Table 5 is cosine', *GATES)
    proj_dim: int = setting(128, "width of the cosine gate's projection", below=4097)
    activation: str = setting("softmax", '"Sig" in Table 5 is sigmoid', *LOG_AFFINITIES)
    individual_gates: bool = setting(False, "a gate and an alpha for each layer, not one for all")
    vote: str = setting("mode", 'batch aggregation, Table 5\'s "Batch Agg"', *VOTES)
    top_k: int = setting(1, "layers chosen for each slot (K)", below=4097)
    alpha: float = setting(0.95, "share of the slot's own layer; where it starts, if learned")
    learn_alpha: bool = setting(False, 'learn alpha, the "Mixing Weights" of Table 5')
    gate_weight: str = setting("renormalised", "a reading of w_j (DECISIONS.md)", *WEIGHTS)
    borrow_size: str = setting("as-is", "own: u_j at the length of u_t, not the paper's", *SIZES)
    route: str = setting("batch", "who decides on the layers", "batch", "sequence")
    layers: tuple[int, ...] | None = setting(None, "slots that mix (all; E2E: the first 12)")
    on_device: bool = setting(False, "the GPU alone learns which layer was chosen, no step waits")

    def check(self, T: int) -> None:
        """Raise InputError unless this fits a model of T layers."""
        check_fields(self)
        if self.top_k > T:
            raise InputError(f"top-k is {self.top_k}, but the model has {T} layers to choose from")
        if self.layers in ((), []):
            raise InputError("no slot is to mix; LoRA alone is --no-molex")
        if any(type(t) is not int or t not in range(T) for t in self.layers or ()):
            span = f"{self.layers[0]}-{self.layers[-1]}"
            raise InputError(f"layers {span} are to mix, but the model has layers 0-{T - 1}")
        if self.alpha > 1 or (self.learn_alpha and self.alpha in (0, 1)):
            raise InputError(f"alpha is {self.alpha}, not between 0 and 1 (or --no-learn-alpha)")
        if self.on_device and self.route != "batch":
            raise InputError("--on-device needs one choice for the batch, not --route sequence")


class MoLEx(nn.Module):
    """The stack of layers, Eq. 4, over the blocks of a model's `Layers`.

    After a forward pass in training, `load_balance` is the load-balance loss, under torchrun this
    process's share of it; `routes` counts what was chosen (support/routes.py)."""

    def __init__(self, blocks: nn.ModuleList, d_model: int, config: MoLExConfig) -> None:
        super().__init__()
        T = len(blocks)
        config.check(T)
        self.blocks = blocks  # the model's own, not copies
        self.config = config
        self.slots = sorted(set(range(T) if config.layers is None else config.layers))
        n_gates = len(self.slots) if config.individual_gates else 1
        new_gate = GATES[config.gate]
        self.gates = nn.ModuleList(new_gate(d_model, T, config) for _ in range(n_gates))
        if config.learn_alpha:  # behind a sigmoid, so that it stays between 0 and 1
            start = math.log(config.alpha / (1 - config.alpha))
            self.alpha_logit = nn.Parameter(torch.full((n_gates,), start))
        self.load_balance: Tensor | None = None
        self.routes = RouteLog(T, self.slots, config.top_k, config.route)
        self.bank = LayerBank(blocks)  # for on_device

    def __getstate__(self) -> dict:
        """For copy.deepcopy, which refuses the graph behind the last pass's loss."""
        return self.__dict__ | {"load_balance": None}

    def gate_of(self, t: int) -> int:
        """Which of the gates and alphas slot t uses."""
        return self.slots.index(t) if self.config.individual_gates else 0

    def alpha(self, t: int) -> Tensor | float:
        """The share of slot t's own layer."""
        if self.config.learn_alpha:
            return self.alpha_logit[self.gate_of(t)].sigmoid()
        return self.config.alpha

    @torch.no_grad()
    def mean_alpha(self) -> float:
        """Of the slots that mix."""
        return mean(float(self.alpha(t)) for t in self.slots)

    def forward(self, z: Tensor, ctx: Context) -> Tensor:
        self.load_balance = z.new_zeros((), dtype=torch.float32) if self.training else None
        self.routes.begin_pass()
        if self.config.on_device:
            self.bank.fill()
        share(*ctx.tensors(), *self.bank.tensors())  # the second stream reads them, too
        for t, block in enumerate(self.blocks):
            z = self.mix(t, z, ctx) if t in self.slots else block(z, ctx, (t, t))
        self.routes.end_pass(len(z), self.load_balance)
        self.bank.clear()
        return z

    def mix(self, t: int, z: Tensor, ctx: Context) -> Tensor:
        """Slot t of Eq. 4, (B, N, D) -> (B, N, D).

        On CUDA the slot's own layer runs on the current stream while the gate and the layers that
        it chooses run on a second one; `fork` and `join` make each wait for the other. On the CPU
        they run one after the other.
        """
        side = fork(z)
        own = self.blocks[t](z, ctx, (t, t))  # the slot's own layer; (t, t): its key in the cache
        with torch.cuda.stream(side):  # None, on the CPU, changes nothing
            log_a = self.log_affinity(t, z)  # the gate
            favourite = log_a.argmax(-1, keepdim=True) == self.routes.numbers  # (B, N, T)
            if self.training:
                balance = self.balance(log_a, favourite, ctx.real)
                self.load_balance = self.load_balance + balance / len(self.slots)
            picks = self.choose(t, log_a, favourite, ctx)  # the vote
            w = self.weights(log_a, picks).type_as(z)
            chosen = self.run_chosen(t, z, ctx, picks, w)  # the layers that it has chosen
        join(side, [*chosen, *self.routes.open[-1:]])  # and what `choose` has noted
        u = own - z
        size = SIZES[self.config.borrow_size]
        updates = []
        for w_j, output in chosen:  # no output: layer t itself, whose update is u
            updates.append(w_j * (u if output is None else size(output - z, u)))
        v = sum(updates[1:], start=updates[0])
        # z + alpha u + (1 - alpha) v, written so that it is exact for alpha = 1 and for v = u
        return own + (1 - self.alpha(t)) * (v - u)

    def run_chosen(self, t: int, z: Tensor, ctx: Context, picks: Tensor, w: Tensor) -> list[tuple]:
        """For each chosen layer its weight (B, N, 1) and output (B, N, D); no output for layer t,
        which runs anyway. If each sequence decides, a layer that any of them has chosen runs for
        all, with weight zero for the others."""
        chosen = []
        if self.config.on_device:  # only the GPU knows the numbers in `picks`
            for k, j in enumerate(picks[0].split(1)):
                output = self.bank(j, z, ctx, (t, f"pick {k}"))
                chosen.append((w[..., k : k + 1], output))
            return chosen
        for j in sorted(set(picks.flatten().tolist())):  # the CPU waits here for the vote
            mine = (picks == j)[:, None]
            weight = (w * mine).sum(-1, keepdim=True)
            output = None if j == t else self.blocks[j](z, ctx, (t, j))
            chosen.append((weight, output))
        return chosen

    def log_affinity(self, t: int, z: Tensor) -> Tensor:
        """log a_nj, how much token n would have layer j: (B, N, D) -> (B, N, T). In float32 even
        under autocast; a logarithm, so that next to impossible layers still have finite weights."""
        with torch.autocast(z.device.type, enabled=False):
            gate = self.gates[self.gate_of(t)]
            scores = gate(z.type_as(next(gate.parameters(), z)))
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            return LOG_AFFINITIES[self.config.activation](scores)

    def choose(self, t: int, log_a: Tensor, favourite: Tensor, ctx: Context) -> Tensor:
        """The K layers that join slot t: (1, K), for the whole batch, or (B, K).

        Every token of the prompt votes for its favourite layer, and VOTES says how votes and mean
        affinities decide (appendix B.1). A decision in the cache stands.
        """
        if ctx.cache is not None and t in ctx.cache.route:
            return ctx.cache.route[t]
        voter = ctx.prompt[..., None]
        # in float64, so that the order of summation (padding, processes) does not turn a vote
        votes = (favourite * voter).sum(1, dtype=torch.float64)  # (B, T)
        affinity = (log_a.detach().exp() * voter).sum(1, dtype=torch.float64)
        if self.config.route == "batch":
            votes = votes.sum(0, keepdim=True)
            affinity = affinity.sum(0, keepdim=True)
            if self.training:
                sum_over_processes(votes, affinity)
        picks = VOTES[self.config.vote](votes, affinity)[:, : self.config.top_k]
        self.routes.add(picks, affinity / votes.sum(-1, keepdim=True).clamp(min=1))
        if ctx.cache is not None:
            ctx.cache.route[t] = picks
        return picks

    def weights(self, log_a: Tensor, picks: Tensor) -> Tensor:
        """w_nj of the chosen layers, (B, N, K); WEIGHTS has the readings of the paper."""
        kept = log_a.gather(-1, picks[:, None].expand(*log_a.shape[:2], -1))
        return WEIGHTS[self.config.gate_weight](kept)

    def balance(self, log_a: Tensor, favourite: Tensor, real: Tensor) -> Tensor:
        """The load-balance loss of one slot (Fedus et al., 2022): T sum_j f_j P_j over real tokens,
        where f_j is the share of tokens whose favourite is j and P_j the mean affinity for j. It is
        1 where all layers fare alike. (A sigmoid's affinities are first made to add up to 1.)"""
        real = real[..., None]
        f = (favourite * real).sum((0, 1)).to(log_a.dtype)
        sum_over_processes(f)
        tokens = f.sum()
        P = (log_a.softmax(-1) * real).sum((0, 1)) / tokens  # under torchrun this process's part
        return len(f) * (f / tokens * P).sum()


def upcycle(model: Transformer, config: MoLExConfig | None = None) -> Transformer:
    """Put MoLEx in the place of the model's layers (sparse upcycling). Changes the model and
    returns it. Only the gate and a learned alpha are new; they are trainable."""
    molex = MoLEx(model.layers.blocks, model.config.d_model, config or MoLExConfig())
    model.layers = molex.to(model.device)
    return model.train(model.training)


if __name__ == "__main__":
    from data import Tokenizer
    from lora import add_lora
    from model import load

    torch.manual_seed(0)  # a gate that has learned nothing yet
    model = add_lora(load("nano/gpt2"), r=4, alpha=32).eval()
    tokenizer = Tokenizer.load("nano/gpt2", model.config)
    ids = torch.tensor([tokenizer.encode("name : Blue Spice | Type : pub | area : riverside")])
    plain = model(ids)
    molex = upcycle(model, MoLExConfig(alpha=1.0)).layers
    print("with alpha = 1 it is the LoRA model:", torch.equal(model(ids), plain))

    def show(t: int, log_a: Tensor, favourite: Tensor, ctx: Context) -> Tensor:
        picks = MoLEx.choose(molex, t, log_a, favourite, ctx)
        votes = favourite.sum((0, 1)).tolist()
        print(f"slot {t}: votes {votes}, so layer {picks.item()} joins")
        return picks

    molex.choose, molex.config = show, MoLExConfig()
    print(f"alpha = 0.95: logits differ by at most {(model(ids) - plain).abs().max():.2f}")
