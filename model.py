"""The transformer, written by hand: GPT-2, RoBERTa and Llama in one small set of modules.

This is the backbone of section 2.1 of the MoLEx paper: T layers that each add an update to the
hidden state, z_{t+1} = z_t + u_t(z_t) (Eq. 3). A layer, residual included, is a `Block`; `Layers`
runs T of them in order. molex.py replaces `Layers`, and nothing else, by its own loop.

    gpt2      pre-norm, learned positions, GELU             (Radford et al., 2019)
    roberta   post-norm, learned positions, bidirectional   (Liu et al., 2019)
    llama     pre-norm RMSNorm, rotary positions, SwiGLU,
              grouped-query attention                       (Dubey et al., 2024)

    python model.py                     what each layer of nano/gpt2 adds to a sequence (Eq. 3)

Shapes in comments: B sequences, N tokens, D channels, d channels of a head, S tokens with those
already in the cache.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.checkpoints import checkpoint_folder, read_checkpoint, read_config
from support.files import InputError, check_tensors


@dataclass(frozen=True)
class Config:
    """What a checkpoint's config.json says, in one vocabulary (see support/checkpoints.py)."""

    family: str  # "gpt2", "roberta" or "llama"
    vocab_size: int
    n_layer: int  # T in the paper
    n_head: int
    n_kv_head: int  # fewer than n_head: grouped-query attention
    d_model: int  # D in the paper
    d_head: int
    d_ff: int  # width of the MLP
    max_positions: int  # longest sequence, in tokens
    norm_eps: float
    activation: str
    tied: bool  # the language-model head is the token embedding
    bias: bool = True  # biases in the projections
    dropout: float = 0.0
    bos: int | None = None  # ids of the special tokens, None if there is none
    eos: int | tuple[int, ...] | None = None
    pad: int | None = None
    # What tells the families apart; the flags of its section in support/families.toml.
    causal: bool = True  # a token sees only earlier ones; False: an encoder
    post_norm: bool = False  # a layer's norms come after its updates, not before
    rms_norm: bool = False  # RMSNorm, not LayerNorm
    gated_mlp: bool = False  # SwiGLU: three projections, without biases
    rotary: bool = False  # positions as angles of q and k, not as embeddings
    segments: bool = False  # an embedding of the text's segment, always the first
    first_position: int = 0  # RoBERTa's: the id of padding, plus 1
    rope: dict = field(default_factory=dict)  # rotary theta and, for Llama 3, its scaling

    @property
    def ends(self) -> tuple[int, ...]:
        """Each of these tokens ends a text; the first is the one that is written."""
        if isinstance(self.eos, tuple):
            return self.eos
        return () if self.eos is None else (self.eos,)

    @classmethod
    def load(cls, name: str | Path) -> "Config":
        """Of a checkpoint folder or hub name. Raises InputError if it is not supported."""
        return cls(**read_config(checkpoint_folder(name)))


class Cache:
    """The keys and values of the tokens seen so far, for generation.

    One pair of tensors for each (slot t, layer that runs there): in a plain transformer only layer
    t runs in slot t, in MoLEx others do as well. `route` is where molex.py keeps its choices.
    """

    def __init__(self) -> None:
        self.kv: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.route: dict[int, Tensor] = {}
        self.real: Tensor | None = None  # (B, S) bool, False for padding
        self.length = 0  # tokens of the longest text; beams side by side count once

    def append(self, key: tuple, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, heads, N, d) to those under `key`; returns all of them."""
        N, S = k.shape[2], self.real.shape[1]
        if key not in self.kv:
            self.kv[key] = (k[:, :, :0], v[:, :, :0])
        old_k, old_v = self.kv[key]
        if old_k.shape[2] < S:  # grow by 64 tokens more than needed, so that this is rare
            missing = S + 64 - old_k.shape[2]
            old_k = F.pad(old_k, (0, 0, 0, missing))
            old_v = F.pad(old_v, (0, 0, 0, missing))
            self.kv[key] = (old_k, old_v)
        old_k[:, :, S - N : S] = k
        old_v[:, :, S - N : S] = v
        return old_k[:, :, :S], old_v[:, :, :S]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.real = self.real[rows]
        for key, (k, v) in self.kv.items():
            self.kv[key] = (k[rows], v[rows])
        for t, picks in self.route.items():
            if len(picks) > 1:  # a choice for each sequence, not one for the batch
                self.route[t] = picks[rows]


@dataclass
class Context:
    """What every layer of one forward pass is given beside the hidden state."""

    real: Tensor  # (B, N) bool, False for padding
    prompt: Tensor  # (B, N) bool, real tokens given, not generated: MoLEx lets them vote
    mask: Tensor | None  # (B, 1, N, S) bool, which token sees which; None: no padding
    causal: bool  # tokens see only earlier ones, and there is no mask that says so
    rope: tuple[Tensor, Tensor] | None  # cos and sin, each (B, 1, N, d)
    cache: Cache | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.real, self.prompt, self.mask, *(self.rope or ())


def attention_mask(seen: Tensor, N: int, causal: bool) -> Tensor:
    """Which of the last N tokens sees which of all S: (B, S) bool -> (B, 1, N, S) bool."""
    B, S = seen.shape
    past = S - N
    mask = seen[:, None, None, :].expand(B, 1, N, S)
    if causal:
        mask = mask & torch.ones_like(mask).tril(past)
    # A token that sees nothing (padding on the left) sees itself: an empty row's softmax is NaN.
    itself = torch.eye(N, S, dtype=torch.bool, device=seen.device).roll(past, dims=1)
    return mask | (itself & ~mask.any(-1, keepdim=True))


def rope_angles(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (Su et al., 2021) for (B, N) positions."""
    rope, d = config.rope, config.d_head
    exponent = torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d
    freq = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "llama3":
        # Llama 3.1 stretches the slow waves by `factor`, keeps the fast ones, blends in between.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        waves = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / rope["factor"]
    angles = positions[:, None, :, None].float() * torch.cat([freq, freq])
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of each head by their angle."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).type_as(x)


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": nn.GELU(approximate="tanh"), "silu": F.silu}


def norm(config: Config) -> nn.Module:
    kind = nn.RMSNorm if config.rms_norm else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v are separate projections in all three families."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.d_head, self.dropout = config.d_head, config.dropout
        self.q = nn.Linear(config.d_model, config.n_head * config.d_head, bias=config.bias)
        self.k = nn.Linear(config.d_model, config.n_kv_head * config.d_head, bias=config.bias)
        self.v = nn.Linear(config.d_model, config.n_kv_head * config.d_head, bias=config.bias)
        self.o = nn.Linear(config.n_head * config.d_head, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, ctx: Context, key: tuple) -> Tensor:
        # 1) Queries, keys and values.
        B, N, _ = x.shape
        q = self.q(x).view(B, N, self.n_head, self.d_head).transpose(1, 2)  # (B, heads, N, d)
        k = self.k(x).view(B, N, self.n_kv_head, self.d_head).transpose(1, 2)
        v = self.v(x).view(B, N, self.n_kv_head, self.d_head).transpose(1, 2)
        dtype = q.dtype  # in which the output projection is given y
        if not x.is_cuda:  # in bfloat16 the CPU's attention is slow backwards
            q, k, v = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (q, k, v))
        if ctx.rope is not None:
            q, k = rotate(q, *ctx.rope), rotate(k, *ctx.rope)
        if ctx.cache is not None:
            k, v = ctx.cache.append(key, k, v)
        # 2) In grouped-query attention neighbouring heads share a key and a value. On CUDA the fast
        # kernels take no mask together with enable_gqa, so there the groups are written out.
        groups = self.n_head // self.n_kv_head
        if groups > 1 and x.is_cuda:
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        dropout = self.dropout if self.training else 0.0
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q, k, v, ctx.mask, dropout, ctx.causal, enable_gqa=not x.is_cuda
            )
        return self.o(y.transpose(1, 2).reshape(B, N, -1).to(dtype))


class MLP(nn.Module):
    """Two projections with an activation between, or Llama's three (SwiGLU, Shazeer, 2020)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise InputError(f"activation {config.activation!r} is not one of {[*ACTIVATIONS]}")
        gated = config.gated_mlp
        self.act = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False) if gated else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=not gated)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer, z -> z + u_j(z): attention, then MLP, each with its residual and its norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = norm(config)
        self.attn = Attention(config)
        self.norm2 = norm(config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, z: Tensor, ctx: Context, key: tuple) -> Tensor:
        """(B, N, D) -> (B, N, D). `key`, for the cache: (slot in the stack, layer that runs)."""
        if self.post_norm:
            z = self.norm1(z + self.drop(self.attn(z, ctx, key)))
            z = self.norm2(z + self.drop(self.mlp(z)))
        else:
            z = z + self.drop(self.attn(self.norm1(z), ctx, key))
            z = z + self.drop(self.mlp(self.norm2(z)))
        return z


class Layers(nn.Module):
    """The plain stack of T layers, Eq. 3."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def forward(self, z: Tensor, ctx: Context) -> Tensor:
        for t, block in enumerate(self.blocks):
            z = block(z, ctx, (t, t))
        return z


class ClassificationHead(nn.Module):
    """RoBERTa's: dense, tanh, output. It reads the first token (<s>), or a decoder's last one."""

    def __init__(self, config: Config, labels: int) -> None:
        super().__init__()
        self.causal = config.causal
        self.drop = nn.Dropout(config.dropout)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, labels)

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        """Hidden states (B, N, D) and the mask of real tokens (B, N) -> (B, labels)."""
        if not self.causal:
            h = h[:, 0]
        else:  # only its last token has seen them all
            places = torch.arange(real.shape[1], device=h.device)
            last = (real * places).argmax(dim=1)
            h = h[torch.arange(len(h), device=h.device), last]
        h = torch.tanh(self.dense(self.drop(h)))
        return self.out(self.drop(h))


class Transformer(nn.Module):
    """Embeddings, T layers, a head: "lm" (a decoder's: the next token), "none" (hidden
    states only), or a number of labels (a classification head; one label is a score)."""

    def __init__(self, config: Config, head: str | int = "lm") -> None:
        super().__init__()
        self.config = config
        self.precision: str | None = None  # of matrix products; None: bf16 on CUDA
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if not config.rotary:
            rows = config.first_position + config.max_positions
            self.positions = nn.Embedding(rows, config.d_model)
        if config.segments:
            self.token_type = nn.Embedding(1, config.d_model)
        self.norm = norm(config)  # after the layers; with post_norm after the embeddings
        self.layers = Layers(config)
        self.hidden_only = head == "none"
        self.head = None
        if isinstance(head, int):
            self.head = ClassificationHead(config, head)
        elif head == "lm" and not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def bf16(self) -> bool:
        """Whether matrix products are in bfloat16: by default on CUDA only."""
        known = {"bf16": True, "float32": False, None: self.device.type == "cuda"}
        if self.precision not in known:
            raise InputError(f"precision is {self.precision!r}, not bf16 or float32")
        return known[self.precision]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def cast_frozen(self) -> None:
        """For bf16: store frozen linear layers so, or autocast would cast them in every pass."""
        if not self.bf16:
            return
        for m in self.layers.blocks.modules():
            if isinstance(m, nn.Linear) and not m.weight.requires_grad:
                m.to(torch.bfloat16)

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        prompt: Tensor | None = None,
        cache: Cache | None = None,
        sees: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, N) -> final hidden states (B, N, D).

        mask: (B, N) bool, False for padding, on either side; None: no padding.
        prompt: (B, N) bool, the tokens that are given rather than generated; None: all real ones.
        cache: keys and values of the tokens before these; these are added to it.
        sees: (B, N, S) bool, which tokens each of these sees. For beam search, where the N tokens
            are not one text but the newest token of each beam.
        Raises InputError if the sequence is longer than the model has positions.
        """
        c, N = self.config, ids.shape[1]
        # 1) Which tokens are there, with those in the cache: (B, S).
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        seen, length = real, N
        if cache is not None:
            if cache.real is not None:
                seen = torch.cat([cache.real, real], dim=1)
            cache.real = seen
            cache.length += N if sees is None else 1
            length = cache.length
        if length > c.max_positions:
            what = f"{length} tokens are more than the {c.max_positions} positions of the model"
            raise InputError(what)

        # 2) Who sees whom, and where each token stands: padding does not count.
        if sees is not None:
            looks, position = sees[:, None], sees.sum(-1)
        else:
            padded = mask is not None or cache is not None
            alone = seen.shape[1] == 1  # a single token sees itself anyway
            looks = attention_mask(seen, N, c.causal) if padded and not alone else None
            position = seen.cumsum(1)[:, -N:]
        position = (position - 1).clamp(min=0) + c.first_position
        if c.first_position:  # the row before the first is that of padding
            position = position.masked_fill(~real, c.first_position - 1)
        prompt = real if prompt is None else prompt.bool() & real
        rope = rope_angles(c, position) if c.rotary else None
        ctx = Context(real, prompt, looks, c.causal and looks is None, rope, cache)

        # 3) Embeddings, layers, norm.
        z = self.embed(ids)
        if not c.rotary:
            z = z + self.positions(position)
        if c.segments:
            z = z + self.token_type.weight[0]
        if c.post_norm:
            z = self.norm(z)
        z = self.layers(F.dropout(z, c.dropout, self.training), ctx)
        return z if c.post_norm else self.norm(z)

    def logits(self, h: Tensor, real: Tensor | None = None) -> Tensor:
        """Hidden states (..., D) -> (..., vocabulary); with a classification head (B, N, D) and
        the mask of real tokens (B, N) -> (B, labels)."""
        if isinstance(self.head, ClassificationHead):
            return self.head(h, torch.ones_like(h[..., 0]) if real is None else real)
        if self.head is not None:
            return self.head(h)
        return h if self.hidden_only else F.linear(h, self.embed.weight)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, prompt: Tensor | None = None, **more: object
    ) -> Tensor:
        """Token ids (B, N) -> logits (B, N, vocabulary) or (B, labels); see `hidden`."""
        return self.logits(self.hidden(ids, mask, prompt, **more), mask)

    def loss(self, batch, smoothing: float = 0.0) -> Tensor:
        """The loss of a `data.Batch`, summed over its M targets: cross-entropy of the answers'
        tokens or of labels, squared error of scores. `smoothing`: label smoothing."""
        batch = batch.to(self.device)
        with self.autocast():
            h = self.hidden(batch.ids, batch.mask, batch.prompt)
            if isinstance(self.head, ClassificationHead):
                logits = self.head(h, batch.mask)[batch.where].float()
            else:  # logits are computed only where there is a target
                logits = self.logits(h.flatten(0, 1)[batch.where]).float()
        if logits.shape[-1] == 1:
            return F.mse_loss(logits[:, 0], batch.target.float(), reduction="sum")
        return F.cross_entropy(logits, batch.target, label_smoothing=smoothing, reduction="sum")


def load(
    name: str | Path, head: str | int = "lm", dropout: float | None = None, task: str | None = None
) -> Transformer:
    """A pretrained model from a folder or the hub ("gpt2-medium"), in float32 on the CPU.

    head: see `Transformer`. A classification head is new unless the checkpoint has one that fits;
        with a GLUE `task` its classes must be the task's, and are put in GLUE's order.
    dropout: replaces the checkpoint's own.
    Raises InputError, naming the tensors, unless checkpoint and model fit exactly.
    """
    # 1) The config, and which head there is to be.
    settings, tensors = read_checkpoint(name, task)
    config = Config(**settings)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    if head == "lm" and not config.causal:  # its head, for masked tokens, is of no use here
        head = "none"
    if config.tied and head == "lm" and "head.weight" in tensors:  # transformers does the same
        print(f"{name}: config ties lm_head.weight to the embedding, but it differs: used as is")
        config = replace(config, tied=False)
    # 2) The model: no memory and no random numbers, for the checkpoint fills everything.
    with torch.device("meta"):
        model = Transformer(config, head)
    # 3) A head that the checkpoint does not have, or not in this shape, is new.
    wanted = model.state_dict()
    ours = {n for n in wanted if n.startswith("head.")}
    fits = ours and all(n in tensors and tensors[n].shape == wanted[n].shape for n in ours)
    if head != "lm" and not fits:
        tensors = {n: w for n, w in tensors.items() if not n.startswith("head.")}
        if ours:
            new = ClassificationHead(config, head).state_dict()
            tensors |= {"head." + n: w for n, w in new.items()}
    # 4) The weights.
    check_tensors(tensors, wanted, name)
    tensors = {n: w.float().contiguous() for n, w in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


if __name__ == "__main__":
    model = load("nano/gpt2")
    ids = torch.arange(100, 116)[None]
    blocks = list(model.layers.blocks)

    def show(block: Block, inputs: tuple, output: Tensor) -> None:
        t, z = blocks.index(block), inputs[0]
        print(f"layer {t}: z has norm {z.norm():6.1f}, u_{t}(z) {(output - z).norm():6.1f}")

    for block in blocks:
        block.register_forward_hook(show)
    with torch.no_grad():
        logits = model(ids)
    print(f"logits {tuple(logits.shape)}, the likeliest next token is {logits[0, -1].argmax()}")
