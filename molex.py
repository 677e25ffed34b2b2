"""MoLEx: every layer of a pretrained model also runs one more, picked by a gate (section 2.2).

    z_{t+1} = z_t + alpha u_t(z_t) + (1 - alpha) sum_j w_j u_j(z_t)                         (Eq. 4)

u_j(z) = block_j(z) - z is the update of layer j, alpha = 0.95, and the sum runs over the K layers
(K = 1) that the gate has chosen among all T. Layers are shared, not copied ("sparse upcycling"):
the only new parameters are the gate's and, if learned, alpha.

    model = upcycle(add_lora(load("gpt2-medium"), r=4, alpha=32), MoLExConfig())

`MoLEx` takes the place of model.py's `Layers`, so nothing else changes. Where the paper is silent:

- Every token scores all layers, but one decision holds for the whole batch ("batch routing",
  appendix B.1) - or for each sequence, with route="sequence", and then a prediction does not depend
  on what else is in the batch. Padding never votes.
- In a language model only the prompt votes. Later tokens must not decide how earlier ones are
  read, and at generation they do not exist yet. The decision is then held while the answer is
  written, which keeps the key/value cache exact: one per (slot, layer that runs there).
- alpha = 1, or a gate that picks layer t in slot t, gives back the LoRA model bit for bit.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model import Context, InputError, Transformer


def setting(default: object, help: str, *choices: str) -> object:
    """A field with its help and what it can be: train.py makes a flag of each."""
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass(frozen=True)
class MoLExConfig:
    """The gate of Tables 5 and 6. The defaults are the paper's for E2E."""

    gate: str = setting("linear", '"Cos" in Table 5 is cosine', "linear", "cosine")
    proj_dim: int = setting(128, "of the cosine gate")
    activation: str = setting("softmax", '"Sig" in Table 5 is sigmoid', "softmax", "sigmoid")
    individual_gates: bool = setting(False, "a gate and an alpha for each layer, not one for all")
    vote: str = setting("mode", 'batch aggregation, Table 5\'s "Batch Agg"', "mode", "mean")
    top_k: int = setting(1, "layers chosen for each slot (K)")
    alpha: float = setting(0.95, "share of the slot's own layer; where it starts if learned")
    learn_alpha: bool = setting(False, 'learn alpha, the "Mixing Weights" of Table 5')
    gate_weight: str = setting("renormalised", "two readings of w_j, see MoLEx.weights",
                               "renormalised", "prob")  # fmt: skip
    route: str = setting("batch", "who decides on the layers", "batch", "sequence")
    layers: tuple[int, ...] | None = setting(None, "slots that mix, first-last; E2E: the first 12")

    def check(self, T: int) -> None:
        """Raise InputError unless this fits a model of T layers."""
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["choices"]
            if allowed and value not in allowed:
                raise InputError(f"{f.name} is {value!r}, not {' or '.join(allowed)}")
        if not 1 <= self.top_k <= T:
            raise InputError(f"top-k is {self.top_k}, but the model has {T} layers to choose from")
        if any(t not in range(T) for t in self.layers or ()):
            span = f"{self.layers[0]}-{self.layers[-1]}"
            raise InputError(f"layers {span} are to mix, but the model has layers 0-{T - 1}")
        inside = 0 < self.alpha < 1 if self.learn_alpha else 0 <= self.alpha <= 1
        if not inside:
            raise InputError(f"alpha is {self.alpha}, not between 0 and 1")


class LinearGate(nn.Linear):
    """g(z) = W z + b, section 2.2. (..., D) -> (..., T)."""


class CosineGate(nn.Module):
    """The router of X-MoE (Chi et al., 2022): project z, take the cosine with one learned embedding
    per layer, divide by a learned temperature. (..., D) -> (..., T)."""

    def __init__(self, d_model: int, T: int, proj_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, proj_dim, bias=False)
        self.layer = nn.Parameter(torch.randn(T, proj_dim))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.3)))  # the logarithm: stays > 0

    def forward(self, z: Tensor) -> Tensor:
        cosine = F.normalize(self.project(z), dim=-1) @ F.normalize(self.layer, dim=-1).T
        return cosine / self.log_temperature.exp().clamp(min=0.01)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Under data parallelism N processes decide what one with the whole batch would."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class MoLEx(nn.Module):
    """The stack of layers, Eq. 4; a drop-in for `model.Layers` over the same blocks.

    After a forward pass in training mode `load_balance` is the loss of Fedus et al. (2022),
    averaged over the slots that mix. `counts[t, j]`: how many sequences had layer j chosen in t.
    """

    def __init__(self, blocks: nn.ModuleList, d_model: int, config: MoLExConfig) -> None:
        super().__init__()
        T = len(blocks)
        config.check(T)
        self.blocks, self.config = blocks, config
        self.slots = sorted(set(range(T) if config.layers is None else config.layers))
        copies = len(self.slots) if config.individual_gates else 1
        self.gates = nn.ModuleList(
            LinearGate(d_model, T) if config.gate == "linear"
            else CosineGate(d_model, T, config.proj_dim) for _ in range(copies)
        )  # fmt: skip
        if config.learn_alpha:  # a free parameter behind a sigmoid stays a mixture at any step size
            start = math.log(config.alpha / (1 - config.alpha))
            self.alpha_logit = nn.Parameter(torch.full((copies,), start))
        self.load_balance: Tensor | None = None
        self.counts = torch.zeros(T, T, dtype=torch.long)
        self.history: Counter = Counter()  # sums over training, see `summary`
        self.last: dict[int, list[int]] = {}  # which layers each slot was given last in training
        self.side: torch.cuda.Stream | None = None

    def alpha(self, t: int) -> Tensor | float:
        """The share of the slot's own layer."""
        if not self.config.learn_alpha:
            return self.config.alpha
        return self.alpha_logit[self.copy(t)].sigmoid()

    def copy(self, t: int) -> int:
        """Which gate and alpha slot t uses."""
        return self.slots.index(t) if self.config.individual_gates else 0

    def shares(self) -> Tensor:
        """For how many of the sequences, in %, layer j was chosen in slot t: (T, T), rows t. K = 2
        adds up to 200; a slot that does not mix chooses none."""
        return 100 * self.config.top_k * self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Of training since the last call, with route="batch": the shares of votes that changed a
        slot's layers and that took its own one, the mean affinity of the chosen layers and the
        load-balance loss; and alpha now, a mean over the slots."""
        h = self.history
        found = {name: h[name] / max(1, h["votes"]) for name in ("changed", "own", "affinity")}
        found["balance"] = float(h["balance"]) / max(1, h["passes"])
        h.clear()
        learned = self.config.learn_alpha
        found["alpha"] = self.alpha_logit.sigmoid().mean().item() if learned else self.config.alpha
        return found

    def forward(self, z: Tensor, ctx: Context) -> Tensor:
        self.load_balance = z.new_zeros((), dtype=torch.float32) if self.training else None
        if z.is_cuda:
            self.side = self.side or torch.cuda.Stream(z.device)
            for x in (ctx.real, ctx.prompt, ctx.mask, *(ctx.rope or ())):
                if x is not None:  # not to be reused before both streams are done with it
                    x.record_stream(self.side)
        for t, block in enumerate(self.blocks):
            z = self.mix(t, z, ctx) if t in self.slots else block(z, ctx, slot=t)
        if self.training:
            self.history.update(passes=1, balance=self.load_balance.detach())
        return z

    def mix(self, t: int, z: Tensor, ctx: Context) -> Tensor:
        """One slot of Eq. 4, (B, N, D) -> (B, N, D).

        On CUDA the slot's own layer runs on the current stream while the gate and the layers it
        chooses run on a second one. Their names have to reach the CPU, which starts them, but that
        waits for the second stream alone. On the CPU one runs after the other. If each sequence
        chooses, a layer that any of them chose runs for all, with weight zero for the others.
        """
        if z.is_cuda:
            main = torch.cuda.current_stream(z.device)
            self.side.wait_stream(main)
            z.record_stream(self.side)
        own = self.blocks[t](z, ctx, slot=t)
        with torch.cuda.stream(self.side if z.is_cuda else None):  # None: no change of stream
            log_a = self.log_affinity(t, z)
            best = log_a.argmax(-1)
            if self.training:
                self.load_balance = self.load_balance + self.balance(log_a, best, ctx.real)
            picks = self.choose(t, log_a, best, ctx)
            w = self.weights(log_a, picks)
            chosen = sorted({j for pick in picks for j in pick})
            others = {j: self.blocks[j](z, ctx, slot=t) for j in chosen if j != t}
        if z.is_cuda:
            main.wait_stream(self.side)
            for x in (w, *others.values()):
                x.record_stream(main)
        u = own - z
        terms = [w[..., j, None] * (others[j] - z if j != t else u) for j in chosen]
        v = sum(terms[1:], start=terms[0])
        # z + alpha u + (1 - alpha) v, in the form that is exact for alpha = 1 and for v = u
        return own + (1 - self.alpha(t)) * (v - u)

    def log_affinity(self, t: int, z: Tensor) -> Tensor:
        """log a_nj, how much each token would have each layer: (B, N, D) -> (B, N, T).

        In float32 whatever the autocast, and as a logarithm, so that a token to which the chosen
        layer is next to impossible still has finite weights.
        """
        with torch.autocast(z.device.type, enabled=False):
            scores = self.gates[self.copy(t)](z.to(torch.promote_types(z.dtype, torch.float32)))
            if self.config.activation == "softmax":
                return scores.log_softmax(-1)
            return F.logsigmoid(scores)

    def balance(self, log_a: Tensor, best: Tensor, real: Tensor) -> Tensor:
        """Load-balance loss of one slot, T sum_j f_j P_j over real tokens: f_j is the share of
        tokens whose best layer is j, P_j its mean share of the affinity (a sigmoid's does not add
        up to 1). 1 where all layers fare alike."""
        T = log_a.shape[-1]
        f = sum_over_ranks((F.one_hot(best, T) * real[..., None]).sum((0, 1)).to(log_a.dtype))
        tokens = f.sum()
        P = (log_a.softmax(-1) * real[..., None]).sum((0, 1)) / tokens
        return T * (f / tokens * P).sum() / len(self.slots)

    def choose(self, t: int, log_a: Tensor, best: Tensor, ctx: Context) -> list[list[int]]:
        """The K layers that join slot t: one list for the batch, or one for each sequence.

        Batch aggregation (appendix B.1): "mean" takes the layers of highest mean affinity; in
        "mode" every token votes for its best layer, ties go to the higher mean affinity; then to
        the lower index. Only prompt tokens vote, and a decision that the cache holds stands.
        """
        if ctx.cache is not None and t in ctx.cache.route:
            return ctx.cache.route[t]
        T, voter = log_a.shape[-1], ctx.prompt[..., None]
        votes = (F.one_hot(best, T) * voter).sum(1).double()  # (B, T)
        # in float64, where the order of summation (padding, ranks) does not turn a vote
        means = (log_a.detach().exp() * voter).sum(1, dtype=torch.float64)
        tally = torch.stack([votes, means], dim=1)
        if self.config.route == "batch":
            tally = tally.sum(0, keepdim=True)
            if self.training:
                tally = sum_over_ranks(tally)
        picks = []
        for vote, mean in tally.tolist():
            score = mean if self.config.vote == "mean" else list(zip(vote, mean, strict=True))
            order = sorted(range(T), key=score.__getitem__, reverse=True)  # stable: lower first
            picks.append(order[: self.config.top_k])
        if self.training and self.config.route == "batch":
            pick = picks[0]
            affinity = sum(mean[j] for j in pick) / len(pick) / max(1.0, sum(vote))
            changed = pick != self.last.get(t, pick)
            self.history.update(votes=1, changed=changed, own=t in pick, affinity=affinity)
            self.last[t] = pick
        chosen = torch.tensor(picks).flatten().bincount(minlength=T)
        self.counts[t] += chosen * (len(log_a) // len(tally))
        if ctx.cache is not None:
            ctx.cache.route[t] = picks
        return picks

    def weights(self, log_a: Tensor, picks: list[list[int]]) -> Tensor:
        """w_nj, (B, N, T), zero where layer j was not chosen. Two readings of the paper:

        renormalised (Eq. 4, softmax after TopK): a_nj over the sum of the chosen a_n. For K = 1
            that is 1, whatever the gate says, and the task could not teach it; so the gradient
            passes straight through to a_nj, as if w were it.
        prob (appendix B, read as in the Switch Transformer): a_nj itself. The task teaches the
            gate, and the second update is the smaller the less sure the gate is.
        """
        # not blocking: where the cache holds the route, nothing else would make the CPU wait
        index = torch.tensor(picks).to(log_a.device, non_blocking=True)
        index = index[:, None].expand(*log_a.shape[:2], -1)
        kept = log_a.gather(-1, index)  # (B, N, K)
        if self.config.gate_weight == "prob":
            w = kept.exp()
        else:
            w = kept.softmax(-1)
            if self.config.top_k == 1:
                w = w + (kept.exp() - kept.exp().detach())
        return torch.zeros_like(log_a).scatter(-1, index, w)


def upcycle(model: Transformer, config: MoLExConfig | None = None) -> Transformer:
    """Put MoLEx in the place of the model's layers (sparse upcycling). Changes the model, returns
    it. The gate, and alpha if learned, are new and trainable; nothing else changes."""
    like = model.embed.weight
    molex = MoLEx(model.layers.blocks, model.config.d_model, config or MoLExConfig())
    model.layers = molex.to(like.device)
    return model.train(model.training)
