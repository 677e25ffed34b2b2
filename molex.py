"""MoLEx: every layer of a pretrained model also runs one more, picked by a gate (section 2.2).

    z_{t+1} = z_t + alpha u_t(z_t) + (1 - alpha) sum_j w_j u_j(z_t)                         (Eq. 4)

u_j(z) = block_j(z) - z is the update of layer j, alpha = 0.95, and the sum runs over the K layers
(K = 1) that the gate has chosen among all T. Layers are shared, not copied ("sparse upcycling"):
the only new parameters are the gate's and, if learned, alpha.

    model = upcycle(add_lora(load("gpt2-medium"), r=4, alpha=32), MoLExConfig())
    python molex.py                     one sentence's way through nano/gpt2, slot by slot

`MoLEx` takes the place of model.py's `Layers`, so nothing else changes. Where the paper is silent:

- Every token scores all layers, but one decision holds for the whole batch ("batch routing",
  appendix B.1) - or for each sequence, with route="sequence", and then a prediction does not depend
  on what else is in the batch. Padding never votes.
- In a language model only the prompt votes. Later tokens must not decide how earlier ones are
  read, and at generation they do not exist yet. The decision is then held while the answer is
  written, which keeps the key/value cache exact: one per (slot, layer that runs there).
- alpha = 1, or a gate that picks layer t in slot t, gives back the LoRA model bit for bit.

Who starts the chosen layer? The CPU, which has to wait for the gate's vote in every slot; or, with
on_device, the GPU: the weights of all layers lie in one matrix, a row each, and the vote is an
index into it that the CPU never reads. So a step never waits, and can be a CUDA graph.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from model import Context, Transformer
from support.files import InputError


def setting(default: object, help: str, *choices: str, **limits: float) -> object:
    """A field with its help and what it can be; a number: from `least`, less than `below`. train.py
    makes a flag of each."""
    limits = dict(least=0 if isinstance(default, float) else 1, below=1e30) | limits
    return field(default=default, metadata=dict(help=help, choices=choices) | limits)


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
    gate_weight: str = setting("renormalised", "a reading of w_j (README)", "renormalised", "prob")
    route: str = setting("batch", "who decides on the layers", "batch", "sequence")
    layers: tuple[int, ...] | None = setting(None, "slots that mix, first-last; E2E: the first 12")
    on_device: bool = setting(False, "chosen layers by an index that the CPU never reads, for CUDA")

    def check(self, T: int) -> None:
        """Raise InputError unless this fits a model of T layers."""
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["choices"]
            if allowed and value not in allowed:
                raise InputError(f"{f.name} is {value!r}, not {' or '.join(allowed)}")
        if not 1 <= self.top_k <= T:
            raise InputError(f"top-k is {self.top_k}, but the model has {T} layers to choose from")
        if self.proj_dim < 1:
            raise InputError(f"proj-dim is {self.proj_dim}, but a projection has at least one row")
        if any(type(t) is not int or t not in range(T) for t in self.layers or ()):
            span = f"{self.layers[0]}-{self.layers[-1]}"
            raise InputError(f"layers {span} are to mix, but the model has layers 0-{T - 1}")
        inside = 0 < self.alpha < 1 if self.learn_alpha else 0 <= self.alpha <= 1
        if not inside:
            raise InputError(f"alpha is {self.alpha}, not between 0 and 1")
        if self.on_device and self.route != "batch":
            raise InputError("on-device needs one choice for the batch, not --route sequence")


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
        cosine = partial(CosineGate, proj_dim=config.proj_dim)
        gate = cosine if config.gate == "cosine" else LinearGate
        self.gates = nn.ModuleList(gate(d_model, T) for _ in range(copies))
        if config.learn_alpha:  # a free parameter behind a sigmoid stays a mixture at any step size
            start = math.log(config.alpha / (1 - config.alpha))
            self.alpha_logit = nn.Parameter(torch.full((copies,), start))
        self.load_balance: Tensor | None = None
        self.bank: list[tuple[dict[str, torch.Size], Tensor]] = []  # of one pass, see `stack`
        self.side: torch.cuda.Stream | None = None
        self.made: list[tuple[Tensor, Tensor]] = []  # of one pass, see `record`
        for name, start in dict(
            numbers=torch.arange(T),
            index=torch.tensor(self.slots),
            counts=torch.zeros(T, T, dtype=torch.long),
            last=torch.full((len(self.slots), config.top_k), -1),  # picks in training, see `record`
            sums=torch.zeros(6, dtype=torch.float64),  # over training, see `summary`
        ).items():
            self.register_buffer(name, start, persistent=False)

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
        counts = self.counts.cpu()
        return 100 * self.config.top_k * counts / counts.sum(1, keepdim=True).clamp(min=1)

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Of training since the last call, with route="batch": the shares of votes that changed a
        slot's layers and that took its own one, the mean affinity of the chosen layers and the
        load-balance loss; and alpha now, a mean over the slots."""
        votes, changed, own, affinity, passes, balance = self.sums.tolist()
        self.sums.zero_()
        learned, n = self.config.learn_alpha, max(1, votes)
        alpha = self.alpha_logit.sigmoid().mean().item() if learned else self.config.alpha
        means = dict(changed=changed / n, own=own / n, affinity=affinity / n)
        return means | dict(balance=balance / max(1, passes), alpha=alpha)

    def forward(self, z: Tensor, ctx: Context) -> Tensor:
        self.load_balance = z.new_zeros((), dtype=torch.float32) if self.training else None
        self.bank, self.made = self.stack() if self.config.on_device else [], []
        if z.is_cuda:
            self.side = self.side or torch.cuda.Stream(z.device)
            shared = (ctx.real, ctx.prompt, ctx.mask, *(ctx.rope or ()), *(m for _, m in self.bank))
            for x in shared:
                if x is not None:  # not to be reused before both streams are done with it
                    x.record_stream(self.side)
        for t, block in enumerate(self.blocks):
            z = self.mix(t, z, ctx) if t in self.slots else block(z, ctx, (t, t))
        if self.made:
            self.record(len(z))
        self.bank, self.made = [], []
        return z

    def mix(self, t: int, z: Tensor, ctx: Context) -> Tensor:
        """One slot of Eq. 4, (B, N, D) -> (B, N, D).

        On CUDA the slot's own layer runs on the current stream while the gate and the layers it
        chooses run on a second one. Unless on_device, their numbers have to reach the CPU, which
        starts them, but that waits for the second stream alone. On the CPU one runs after the
        other, the slot's own one once. If each sequence chooses, a layer that any of them chose
        runs for all, with weight zero for the others.
        """
        if z.is_cuda:
            main = torch.cuda.current_stream(z.device)
            self.side.wait_stream(main)
            z.record_stream(self.side)
        own = self.blocks[t](z, ctx, (t, t))
        with torch.cuda.stream(self.side if z.is_cuda else None):  # None: no change of stream
            log_a = self.log_affinity(t, z)
            best = log_a.argmax(-1, keepdim=True) == self.numbers
            if self.training:
                self.load_balance = self.load_balance + self.balance(log_a, best, ctx.real)
            picks = self.choose(t, log_a, best, ctx)
            w = self.weights(log_a, picks)
            if self.config.on_device:
                chosen = enumerate(picks[0].split(1))
                others = [self.borrow(j, z, ctx, (t, f"pick {k}")) for k, j in chosen]
                shares = w.split(1, dim=-1)
            else:
                chosen = sorted({*picks.flatten().tolist()})
                others = [self.blocks[j](z, ctx, (t, j)) if j != t else None for j in chosen]
                shares = [(w * (picks == j)[:, None]).sum(-1, keepdim=True) for j in chosen]
        if z.is_cuda:
            main.wait_stream(self.side)
            for x in chain(shares, others, *self.made[-1:]):
                if x is not None:
                    x.record_stream(main)
        u, pairs = own - z, zip(shares, others, strict=True)
        terms = [w_j * (u if other is None else other - z) for w_j, other in pairs]
        v = sum(terms[1:], start=terms[0])
        # z + alpha u + (1 - alpha) v, in the form that is exact for alpha = 1 and for v = u
        return own + (1 - self.alpha(t)) * (v - u)

    def stack(self) -> list[tuple[dict[str, torch.Size], Tensor]]:
        """The weights of the layers as matrices (T, weights of a layer), a row for each layer; one
        matrix for each dtype, trained or not, with the names and shapes of what a row holds."""
        groups = defaultdict(dict)
        for name, p in self.blocks[0].named_parameters():
            groups[p.dtype, p.requires_grad][name] = p.shape
        bank = []
        for shapes in groups.values():
            rows = [block.get_parameter(name).flatten() for block in self.blocks for name in shapes]
            bank.append((shapes, torch.cat(rows).view(len(self.blocks), -1)))
        return bank

    def borrow(self, j: Tensor, z: Tensor, ctx: Context, key: tuple) -> Tensor:
        """Layer j, a number (1,) that only the device knows: any block with the weights in row j.
        In training its dropout is not that of the slot's own layer, even if it is that layer."""
        weights = {}
        for shapes, matrix in self.bank:
            row = matrix.index_select(0, j)[0].split([shape.numel() for shape in shapes.values()])
            weights |= {name: x.view(shapes[name]) for name, x in zip(shapes, row, strict=True)}
        return functional_call(self.blocks[0], weights, (z, ctx, key))

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
        up to 1). 1 where all layers fare alike. `best` (B, N, T) is true for a token's best."""
        f = sum_over_ranks((best & real[..., None]).sum((0, 1)).to(log_a.dtype))
        tokens = f.sum()
        P = (log_a.softmax(-1) * real[..., None]).sum((0, 1)) / tokens
        return len(f) * (f / tokens * P).sum() / len(self.slots)

    def choose(self, t: int, log_a: Tensor, best: Tensor, ctx: Context) -> Tensor:
        """The K layers that join slot t: (1, K) for the batch, or (B, K) for each sequence.

        Batch aggregation (appendix B.1): "mean" takes the layers of highest mean affinity; in
        "mode" every token votes for its best layer, ties go to the higher mean affinity; then to
        the lower index. Only prompt tokens vote, and a decision that the cache holds stands.
        """
        if ctx.cache is not None and t in ctx.cache.route:
            return ctx.cache.route[t]
        voter = ctx.prompt[..., None]
        # in float64, where the order of summation (padding, ranks) does not turn a vote
        sums = [(x * voter).sum(1, dtype=torch.float64) for x in (best, log_a.detach().exp())]
        tally = torch.stack(sums)  # (2, B, T): votes and affinities
        if self.config.route == "batch":
            tally = tally.sum(1, keepdim=True)
            if self.training:
                tally = sum_over_ranks(tally)
        votes, affinity = tally
        order = affinity.argsort(descending=True, stable=True)  # stable: the lower index first
        if self.config.vote == "mode":
            by_votes = votes.gather(1, order).argsort(descending=True, stable=True)
            order = order.gather(1, by_votes)
        picks = order[:, : self.config.top_k]
        self.made.append((picks, affinity / votes.sum(-1, keepdim=True).clamp(min=1)))
        if ctx.cache is not None:
            ctx.cache.route[t] = picks
        return picks

    @torch.no_grad()
    def record(self, B: int) -> None:
        """Note what the slots of this pass have chosen, in `counts` and, for `summary`, in `sums`:
        on the device and all at once, so that training hardly feels it."""
        picks, affinity = map(torch.stack, zip(*self.made, strict=True))  # (slots, 1 or B, K or T)
        each = (picks[..., None] == self.numbers).sum((1, 2))
        self.counts.index_add_(0, self.index, each * (B // picks.shape[1]))
        if not self.training or self.config.route != "batch":
            return
        pick, mean = picks[:, 0], affinity.gather(-1, picks).mean((1, 2))
        changed = ((pick != self.last) & (self.last >= 0)).any(1)
        own = (pick == self.index[:, None]).any(1)
        found = torch.stack([torch.ones_like(mean), changed, own, mean]).sum(1)
        self.sums += torch.cat([found, torch.stack([found[0] / len(pick), self.load_balance])])
        self.last.copy_(pick)

    def weights(self, log_a: Tensor, picks: Tensor) -> Tensor:
        """w_nj of the chosen layers, (B, N, K). Two readings of the paper:

        renormalised (Eq. 4, softmax after TopK): a_nj over the sum of the chosen a_n. For K = 1
            that is 1, whatever the gate says, and the task could not teach it; so the gradient
            passes straight through to a_nj, as if w were it.
        prob (appendix B, read as in the Switch Transformer): a_nj itself. The task teaches the
            gate, and the second update is the smaller the less sure the gate is.
        """
        kept = log_a.gather(-1, picks[:, None].expand(*log_a.shape[:2], -1))
        if self.config.gate_weight == "prob":
            return kept.exp()
        w = kept.softmax(-1)
        return w + (kept.exp() - kept.exp().detach()) if self.config.top_k == 1 else w


def upcycle(model: Transformer, config: MoLExConfig | None = None) -> Transformer:
    """Put MoLEx in the place of the model's layers (sparse upcycling). Changes the model, returns
    it. The gate, and alpha if learned, are new and trainable; nothing else changes."""
    molex = MoLEx(model.layers.blocks, model.config.d_model, config or MoLExConfig())
    model.layers = molex.to(model.device)
    return model.train(model.training)


if __name__ == "__main__":
    from data import Tokenizer
    from lora import add_lora
    from model import load
    from support.files import locate

    torch.manual_seed(0)  # a gate that has learned nothing yet
    model = add_lora(load("nano/gpt2"), r=4, alpha=32).eval()
    tokenizer = Tokenizer.from_folder(locate("nano/gpt2"), model.config)
    ids = torch.tensor([tokenizer.encode("name : Blue Spice | Type : pub | area : riverside")])
    plain = model(ids)
    molex = upcycle(model, MoLExConfig(alpha=1.0)).layers
    print("with alpha = 1 it is the LoRA model:", torch.equal(model(ids), plain))

    def show(t: int, log_a: Tensor, best: Tensor, ctx: Context) -> Tensor:
        picks = MoLEx.choose(molex, t, log_a, best, ctx)
        votes, a = best.sum((0, 1)).tolist(), log_a.exp()[..., picks[0]].mean().item()
        print(f"slot {t}: votes {votes}, so layer {picks.item()} joins; mean affinity {a:.2f}")
        return picks

    molex.choose, molex.config = show, MoLExConfig()
    print(f"alpha = 0.95: logits differ by at most {(model(ids) - plain).abs().max().item():.2f}")
