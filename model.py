"""The transformer, written by hand: GPT-2, RoBERTa and Llama in one small set of modules.

This is the backbone of section 2.1 of the MoLEx paper: T layers that each add an update to the
hidden state, z_{t+1} = z_t + u_t(z_t) (Eq. 3). Every layer, residual included, is one `Block`;
`Layers` runs them in order, and molex.py replaces `Layers` by its own version of that loop.

    gpt2      pre-norm, learned positions, GELU            (Radford et al., 2019)
    roberta   post-norm, learned positions, bidirectional  (Liu et al., 2019)
    llama     pre-norm RMSNorm, rotary positions, SwiGLU,
              grouped-query attention                      (Dubey et al., 2024)

`load("gpt2-medium")` or `load("a/folder")` reads a checkpoint in the Hugging Face layout. Loading
is strict: every parameter is filled and every tensor used or known to be redundant, or it stops.

    python model.py                     what each layer of nano/gpt2 adds to a sequence (Eq. 3)
"""

import math
import re
import reprlib
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.files import (
    COUNT,
    FEW,
    SHARE,
    InputError,
    check,
    check_tensors,
    locate,
    read_json,
    read_tensors,
    reason,
)

# ------------------------------------------------------------------------------------ configuration

FAMILIES = tomllib.loads((Path(__file__).parent / "support/families.toml").read_text("utf-8"))
NAMES = FAMILIES.pop("names")  # ours -> config.json's, in every family
FORMS = dict.fromkeys("vocab_size d_model d_head d_ff max_positions".split(), COUNT)  # see `check`
FORMS |= dict.fromkeys("n_layer n_head n_kv_head".split(), FEW)
FORMS |= dict(activation=(str,), norm_eps=SHARE, dropout=SHARE, tied=(bool,), bias=(bool,))


@dataclass(frozen=True)
class Config:
    """What config.json says, in one vocabulary for the three families."""

    family: str  # "gpt2", "roberta" or "llama"
    vocab_size: int
    n_layer: int  # T in the paper
    n_head: int
    n_kv_head: int  # fewer than n_head: grouped-query attention
    d_model: int  # D in the paper
    d_head: int
    d_ff: int
    max_positions: int  # longest sequence, in tokens
    norm_eps: float
    activation: str
    tied: bool  # the LM head shares the token embedding
    bias: bool = True  # biases in the projections
    dropout: float = 0.0
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    rope: dict = field(default_factory=dict)  # rotary theta and, for Llama 3, its scaling

    @property
    def hub(self) -> dict:
        """What the hub, transformers and peft call things in this family."""
        return FAMILIES[self.family]

    @classmethod
    def from_hf(cls, c: dict, where: object = "config.json") -> "Config":
        """Read the dictionary in a Hugging Face config.json, which messages call `where`. Raises
        InputError if it is unsupported or unsound."""
        family = c.get("model_type")
        if str(family) not in FAMILIES:
            raise InputError(f"model_type {family!r} is not supported; use {', '.join(FAMILIES)}")
        usual = dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), False)
        usual |= dict(scale_attn_weights=True, is_decoder=False, quantization_config=None)
        usual |= dict(tie_word_embeddings=True) if family == "roberta" else {}
        for name, value in usual.items():
            if c.get(name, value) != value:
                raise InputError(f"{where} sets {name} to {reprlib.repr(c[name])}: not supported")

        if isinstance(c.get("eos_token_id"), list):  # some models end in several ways
            c = c | {"eos_token_id": [*c["eos_token_id"], None][0]}
        token = (int, 0, check(c, {"vocab_size": COUNT}, where)["vocab_size"] - 1)
        pad = token if family == "roberta" else (int, -1, 2**24)
        names, config = NAMES | FAMILIES[family]["names"], dict(family=family)
        missing = dict(bos=None, eos=None, pad=None) | FAMILIES[family]["missing"]
        for name, form in (FORMS | dict(bos=token, eos=token, pad=pad)).items():
            theirs = names.get(name, name)
            absent = name in missing and c.get(theirs) is None
            config[name] = missing[name] if absent else check(c, {theirs: form}, where)[theirs]
        n_head, d_model = config["n_head"], config["d_model"]
        config["n_kv_head"] = config["n_kv_head"] or n_head
        config["d_head"] = config["d_head"] or d_model // n_head
        config["d_ff"] = config["d_ff"] or 4 * d_model
        if family == "roberta":  # it numbers its positions from pad + 1
            config["max_positions"] -= config["pad"] + 1
        rope = {"rope_theta": c.get("rope_theta", 10000.0)}
        for name in ("rope_scaling", "rope_parameters"):  # an older name and a newer one
            rope |= check(c, {name: (dict,)}, where)[name] if c.get(name) is not None else {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise InputError(f"rope_type {kind!r} is not supported; use default or llama3")
        numbers = ["rope_theta", *(ROPE_LLAMA3 if kind == "llama3" else ())]
        config["rope"] = check(rope, dict.fromkeys(numbers, (float, 1e-6, 1e9)), where)
        config["rope"]["rope_type"] = kind
        odd = family == "llama" and config["d_head"] % 2  # rotary positions come in pairs
        if n_head % config["n_kv_head"] or odd:
            raise InputError(f"{where}: the numbers of heads and channels do not fit")
        return cls(**check(config, dict(d_head=COUNT, max_positions=COUNT), where))


# ------------------------------------------------------------- what the layers of one pass share


class Cache:
    """Keys and values of the tokens seen so far, one pair per (slot t, layer that runs there).

    In a plain transformer layer t runs in slot t; in MoLEx other layers run there as well. `route`
    is where molex.py keeps the layers it chose for each slot, a row for the batch or one for each
    sequence. `real` marks the tokens (B, S) that are not padding.
    """

    def __init__(self) -> None:
        self.kv: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.route: dict[int, Tensor] = {}
        self.real: Tensor | None = None
        self.length = 0  # of the longest sequence, in tokens; beams side by side count as one

    def append(self, key: tuple, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, heads, N, d) to what is stored under `key` and return all of it."""
        S = self.real.shape[1]
        kept = self.kv.get(key, (k[:, :, :0], v[:, :, :0]))
        if kept[0].shape[2] < S:  # with room for the next tokens
            kept = tuple(F.pad(x, (0, 0, 0, S + 64 - x.shape[2])) for x in kept)
        for x, new in zip(kept, (k, v), strict=True):
            x[:, :, S - new.shape[2] : S] = new
        self.kv[key] = kept
        return kept[0][:, :, :S], kept[1][:, :, :S]

    def select(self, index: Tensor) -> None:
        """Make row i of the batch what row index[i] was: repeats, reorders or drops sequences."""
        self.real = self.real[index]
        for t, picks in self.route.items():
            if len(picks) > 1:
                self.route[t] = picks[index]
        for key, (k, v) in self.kv.items():
            self.kv[key] = k[index], v[index]


@dataclass
class Context:
    """What every layer of one forward pass shares: B sequences of N tokens, S with those before."""

    real: Tensor  # (B, N) bool, False for padding
    prompt: Tensor  # (B, N) bool, the real tokens that are given rather than generated
    mask: Tensor | None  # (B, 1, N, S) bool, who may look at whom; None: no padding
    causal: bool  # True: with mask None, tokens look only at earlier ones
    rope: tuple[Tensor, Tensor] | None  # cos and sin, each (B, 1, N, d_head)
    cache: Cache | None = None


@dataclass
class Batch:
    """B sequences padded on the right to N tokens, with M targets; data.py's `collate` makes it."""

    ids: Tensor  # (B, N)
    mask: Tensor  # (B, N) bool, real tokens
    prompt: Tensor  # (B, N) bool
    where: Tensor  # (M,) places in the flattened (B * N) from which a token is predicted, or the
    # sequences (of B) that have a label
    target: Tensor  # (M,) that token, or that label; a float for a score

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{n: x.to(device, non_blocking=True) for n, x in vars(self).items()})


ROPE_LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]


def rope_angles(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (Su et al., 2021) for (B, N) positions."""
    r, d = config.rope, config.d_head
    inverse = torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d
    freq = 1.0 / r["rope_theta"] ** inverse
    if r["rope_type"] == "llama3":
        # Llama 3.1 stretches the slow waves by `factor`, keeps the fast ones, blends in between.
        wavelength = 2 * math.pi / freq
        low, high = r["low_freq_factor"], r["high_freq_factor"]
        waves = r["original_max_position_embeddings"] / wavelength
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / r["factor"]
    angles = positions[:, None, :, None].float() * torch.cat([freq, freq])
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of each head by their angle."""
    a, b = x.chunk(2, dim=-1)
    return (x * rope[0] + torch.cat([-b, a], dim=-1) * rope[1]).type_as(x)


# ------------------------------------------------------------------------------------------ modules

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def norm(config: Config) -> nn.Module:
    kind = nn.RMSNorm if config.family == "llama" else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v are separate projections in all three families."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, self.config = config, config
        self.q = nn.Linear(c.d_model, c.n_head * c.d_head, bias=c.bias)
        self.k = nn.Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.bias)
        self.v = nn.Linear(c.d_model, c.n_kv_head * c.d_head, bias=c.bias)
        self.o = nn.Linear(c.n_head * c.d_head, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, ctx: Context, key: tuple) -> Tensor:
        B, N, _ = x.shape
        heads = (p(x).view(B, N, -1, self.config.d_head) for p in (self.q, self.k, self.v))
        q, k, v = (p.transpose(1, 2) for p in heads)  # (B, heads, N, d)
        if not x.is_cuda:  # the CPU's attention in bfloat16 is slow backwards
            q, k, v = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (q, k, v))
        if ctx.rope is not None:
            q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
        if ctx.cache is not None:
            k, v = ctx.cache.append(key, k, v)
        # Grouped-query attention: neighbouring heads share a key and a value. On CUDA, says torch's
        # documentation, only two kernels know it, and the fast one of them takes no mask.
        groups = self.config.n_head // self.config.n_kv_head
        if groups > 1 and x.is_cuda:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        how = dict(attn_mask=ctx.mask, is_causal=ctx.causal and ctx.mask is None)
        how |= dict(dropout_p=self.config.dropout * self.training, enable_gqa=not x.is_cuda)
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, **how)
        return self.o(y.transpose(1, 2).reshape(B, N, -1))


class MLP(nn.Module):
    """Two projections with an activation between, or SwiGLU's three (Shazeer, 2020)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        bias, self.act = config.family != "llama", ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False) if not bias else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer, z -> z + u_j(z). Attention, then MLP, each with its residual and its norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.post_norm, self.drop = config.family == "roberta", nn.Dropout(config.dropout)
        self.norm1, self.attn = norm(config), Attention(config)
        self.norm2, self.mlp = norm(config), MLP(config)

    def forward(self, z: Tensor, ctx: Context, key: tuple) -> Tensor:
        """(B, N, D) -> (B, N, D). `key` is the cache's: (slot in the stack, layer that runs)."""
        if self.post_norm:
            z = self.norm1(z + self.drop(self.attn(z, ctx, key)))
            return self.norm2(z + self.drop(self.mlp(z)))
        z = z + self.drop(self.attn(self.norm1(z), ctx, key))
        return z + self.drop(self.mlp(self.norm2(z)))


class Layers(nn.Module):
    """The plain stack of T layers, Eq. 3."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def forward(self, z: Tensor, ctx: Context) -> Tensor:
        for t, block in enumerate(self.blocks):
            z = block(z, ctx, (t, t))
        return z


class MaskedLMHead(nn.Module):
    """RoBERTa's head; its last projection is the token embedding plus a bias."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(config.d_model, config.d_model), norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(h))), embedding, self.bias)


class ClassificationHead(nn.Module):
    """RoBERTa's dense, tanh, output on the first token (<s>), or on a decoder's last real one."""

    def __init__(self, config: Config, labels: int) -> None:
        super().__init__()
        self.family, self.dropout = config.family, config.dropout
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, labels)

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        if self.family == "roberta":
            h = h[:, 0]
        else:
            last = (real * torch.arange(real.shape[1], device=h.device)).argmax(dim=1)
            h = h[torch.arange(len(h), device=h.device), last]
        h = torch.tanh(self.dense(F.dropout(h, self.dropout, self.training)))
        return self.out(F.dropout(h, self.dropout, self.training))


class Transformer(nn.Module):
    """Embeddings, T layers, a head.

    head: "lm" (next or masked token), "none" (hidden states only), or a number of labels (a
    classification head; one label is a regression).
    """

    def __init__(self, config: Config, head: str | int = "lm") -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise InputError(f"activation {config.activation!r} is not one of {[*ACTIVATIONS]}")
        c, self.config = config, config
        self.precision: str | None = None  # of matrix products, "bf16" or "float32"; see `bf16`
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        if c.family != "llama":
            offset = c.pad + 1 if c.family == "roberta" else 0
            self.positions = nn.Embedding(c.max_positions + offset, c.d_model)
        if c.family == "roberta":
            self.token_type = nn.Embedding(1, c.d_model)  # always segment 0: one row to add
        self.norm = norm(c)  # RoBERTa's stands after the embeddings, the others' after the layers
        self.layers = Layers(c)
        self.head = None
        if isinstance(head, int):
            self.head = ClassificationHead(c, head)
        elif head == "lm" and c.family == "roberta":
            self.head = MaskedLMHead(c)
        elif head == "lm" and not c.tied:
            self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def bf16(self) -> bool:
        """Whether matrix products are in bfloat16: by default on CUDA only. Raises InputError."""
        known = {"bf16": True, "float32": False, None: self.device.type == "cuda"}
        if self.precision not in known:
            raise InputError(f"precision is {self.precision!r}, not bf16 or float32")
        return known[self.precision]

    def autocast(self) -> torch.autocast:
        """Matrix products in the model's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def cast_frozen(self) -> None:
        """For bf16, frozen linear layers in bfloat16: autocast would cast them in every pass."""
        if self.bf16:
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
        cache: keys and values of the tokens before these; filled as a side effect.
        sees: (B, N, S) bool, which of the cached tokens and of these each one sees, where they are
        not one text but beams side by side, each a token longer than before.
        Raises InputError if the sequence is longer than the model has positions.
        """
        c, (B, N) = self.config, ids.shape
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        seen, past, padded = real, 0, mask is not None
        if cache is not None:
            if cache.real is not None:
                past, seen = cache.real.shape[1], torch.cat([cache.real, real], dim=1)
            padded, cache.real = True, seen
            cache.length += N if sees is None else 1
        length = N if cache is None else cache.length
        if length > c.max_positions:
            what = f"{length} tokens are more than the {c.max_positions} positions of the model"
            raise InputError(what)
        attention, position = None, seen.cumsum(1)[:, past:]  # (B, N), padding does not count
        if sees is not None:
            attention, position = sees[:, None], sees.sum(-1)
        elif padded and (N > 1 or past):
            attention = seen[:, None, None, :].expand(B, 1, N, past + N)
            if c.family != "roberta":
                attention = attention & torch.ones_like(attention).tril(past)
            # A padding token sees itself, so that no row of the softmax is empty (NaN).
            itself = torch.eye(N, past + N, dtype=torch.bool, device=ids.device)
            attention = attention | itself.roll(past, dims=1)
        position = (position - 1).clamp(min=0)
        rope = rope_angles(c, position) if c.family == "llama" else None
        prompt = real if prompt is None else prompt.bool() & real
        causal = c.family != "roberta" and N > 1
        ctx = Context(real, prompt, attention, causal, rope, cache)

        z = self.embed(ids)
        if c.family == "gpt2":
            z = z + self.positions(position)
        if c.family == "roberta":
            z = z + self.positions((position + 1) * real + c.pad) + self.token_type.weight[0]
            z = self.norm(z)
        z = self.layers(F.dropout(z, c.dropout, self.training), ctx)
        return z if c.family == "roberta" else self.norm(z)

    def logits(self, h: Tensor, real: Tensor | None = None) -> Tensor:
        """Hidden states (..., D) -> (..., vocabulary); with a classification head (B, N, D) and the
        (B, N) mask of real tokens -> (B, labels)."""
        if isinstance(self.head, ClassificationHead):
            return self.head(h, h.new_ones(h.shape[:2]) if real is None else real)
        if isinstance(self.head, MaskedLMHead):
            return self.head(h, self.embed.weight)
        return F.linear(h, self.embed.weight) if self.head is None else self.head(h)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, *rest: object, **more: object
    ) -> Tensor:
        """Token ids (B, N) -> logits (B, N, vocabulary) or (B, labels); see `hidden`."""
        return self.logits(self.hidden(ids, mask, *rest, **more), mask)

    def loss(self, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """The loss that training lowers, summed over the M targets: the cross-entropy of answers'
        tokens (logits are computed for those alone) or of labels; of scores the squared error.
        `smoothing`: label smoothing (Szegedy et al., 2016)."""
        batch = batch.to(self.device)
        with self.autocast():
            h = self.hidden(batch.ids, batch.mask, batch.prompt)
            if isinstance(self.head, ClassificationHead):
                logits = self.head(h, batch.mask)[batch.where].float()
            else:
                logits = self.logits(h.flatten(0, 1)[batch.where]).float()
        if logits.shape[-1] == 1:
            return F.mse_loss(logits[:, 0], batch.target.float(), reduction="sum")
        return F.cross_entropy(logits, batch.target, label_smoothing=smoothing, reduction="sum")


# ---------------------------------------------------------------------------------------- loading

# Tensors that say nothing the model needs: causal masks, position numbers, RoBERTa's pooler.
REDUNDANT = r"\.attn\.(masked_)?bias$|^embeddings\.position_ids$|^pooler\.|inv_freq$"


def convert(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Hugging Face's state dict as ours: names, GPT-2's transposed and fused projections."""
    out = {}
    for name, w in tensors.items():
        for pattern, new in config.hub["rename"]:
            name = re.sub(pattern, new, name)
        if re.search(REDUNDANT, name):
            continue
        w = torch.atleast_1d(w)
        if config.family == "gpt2" and re.search(r"\.(attn|mlp)\.\w+\.weight$", name):
            w = w.transpose(0, -1)  # GPT-2 stores these as (in, out)
        if ".attn.c_attn." in name:  # q, k and v in one
            for part, piece in zip("qkv", w.chunk(3), strict=False):
                out[name.replace("c_attn", part)] = piece
        elif name == "token_type.weight":
            out[name] = w[:1]
        else:
            out[name] = w
    for name, other in config.hub["again"].items():
        if config.tied and name in out and other in out and torch.equal(out[name], out[other]):
            del out[name]
    return out


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder. Raises InputError if there are none, or not whole."""
    names = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
    index, single, legacy = (folder / name for name in names)
    if not (index.exists() or single.exists() or legacy.exists()):
        raise InputError(f"{folder} holds no model.safetensors and no pytorch_model.bin")
    files = [single if single.exists() else legacy]
    if index.exists():
        shards = read_json(index, {"weight_map": (dict,)})["weight_map"].values()
        files = [folder / name for name in sorted({*map(str, shards)})]
    return {name: w for file in files for name, w in read_tensors(file).items()}


def checkpoint_folder(name: str | Path) -> Path:
    """A local folder, or a hub name such as "gpt2-medium", downloaded once and cached."""
    folder = locate(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import GatedRepoError

    wanted = ["*.json", "*.safetensors", "merges.txt"]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(name), allow_patterns=["pytorch_model.bin"])
        return folder
    except Exception as error:  # offline, unknown, gated: many kinds, one thing to tell the user
        if isinstance(error, GatedRepoError):
            what = f"model '{name}' is gated: ask for access at https://huggingface.co/{name}"
            way = "then log in with `hf auth login` or set HF_TOKEN to your access token"
            raise InputError(f"{what}, {way}") from error
        what = f"model '{name}' is neither a folder nor to be had from the hub"
        raise InputError(f"{what} ({reason(error)})") from error


def read_config(folder: Path) -> Config:
    """The Config in a checkpoint folder. Raises InputError if it is missing or unsupported."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json, so it is not a checkpoint")
    return Config.from_hf(read_json(folder / "config.json"), folder / "config.json")


def load(name: str | Path, head: str | int = "lm", dropout: float | None = None) -> Transformer:
    """A pretrained model from a folder or the hub, in float32 on the CPU, in evaluation mode.

    head: see `Transformer`. A classification head is new unless the checkpoint carries one.
    dropout: replaces the checkpoint's own.
    Raises InputError, naming the tensors, unless checkpoint and model fit exactly.
    """
    folder = checkpoint_folder(name)
    config = read_config(folder)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    have = convert(read_weights(folder), config)
    if config.tied and head == "lm" and "head.weight" in have:  # transformers does the same
        print(f"{folder}: config ties lm_head.weight to the embedding, but it differs: used as is")
        config = replace(config, tied=False)
    with torch.device("meta"):  # no memory, no initialisation: the checkpoint fills every parameter
        model = Transformer(config, head)
    wanted = model.state_dict()
    head_names = {n for n in wanted if n.startswith("head.")}
    fits = all(n in have and have[n].shape == wanted[n].shape for n in head_names)
    if head != "lm" and not (fits and head_names):  # the checkpoint's head is for something else
        have = {n: w for n, w in have.items() if not n.startswith("head.")}
        wanted = {n: w for n, w in wanted.items() if not n.startswith("head.")}
    check_tensors(have, wanted, folder)
    have = {n: w.float().contiguous() for n, w in have.items()}
    if head_names - have.keys():
        fresh = ClassificationHead(config, head).state_dict()
        have |= {"head." + n: w for n, w in fresh.items()}
    model.load_state_dict(have, assign=True)
    return model.eval()


if __name__ == "__main__":
    model, ids = load("nano/gpt2"), torch.arange(100, 116)[None]
    blocks = [*model.layers.blocks]

    def show(block: Block, inputs: tuple, z: Tensor) -> None:
        t, u = blocks.index(block), z - inputs[0]
        print(f"layer {t}: z has norm {inputs[0].norm():6.1f}, u_{t}(z) {u.norm():6.1f}")

    for block in blocks:
        block.register_forward_hook(show)
    with torch.no_grad():
        logits = model(ids)
    print(f"logits {tuple(logits.shape)}, the likeliest next token is {logits[0, -1].argmax()}")
