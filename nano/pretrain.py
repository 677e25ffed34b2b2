"""Train a small byte-level BPE and pretrain a small GPT-2 or RoBERTa on a folder of plain text.

It wrote nano/gpt2, the model that `python train.py` fine-tunes by default, and nano/roberta: two
checkpoints in the Hugging Face layout (float16) that model.py, and transformers, load like any
other. GPT-2 learns to predict the next token, RoBERTa masked ones (Devlin et al., 2019).

A model of 2M parameters that has read only newspapers has no words for restaurants and no habit of
looking up, across an end-of-text token, what it met before. So --guide adds plain text from the
grammar of make_e2e.py, where three documents in a row describe one restaurant in different words.
There are no meaning representations in it, and none of the restaurants of nano/e2e.

    pip install -r requirements-dev.txt                      # for `tokenizers`
    python nano/pretrain.py --text DIR --family gpt2         # DIR holds *.txt
    python nano/pretrain.py --text DIR --family roberta --lr 2e-3 --warmup 300 --steps 6000

With --resume the same command goes on after a kill.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Tokenizer
from model import Config, Transformer, norm
from nano.make_e2e import UNSEEN_NAMES, format_mr, make_splits, random_mr, realise
from support.checkpoints import convert, our_config, read_config, read_weights
from support.cli import command_line
from support.files import InputError

# Ids 0, 1, ...; text never encodes to them. GPT-2's one stands between documents.
SPECIAL = {"gpt2": ["<|endoftext|>"], "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]}
MASK_SHARE = 0.15  # of the tokens, as BERT and RoBERTa


def documents(folder: Path) -> list[str]:
    """Paragraphs (blank lines part them) of all text files in the folder, in a fixed order."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"{folder} holds no *.txt files")
    texts = [part.strip() for f in files for part in re.split(r"\n\s*\n", f.read_text("utf-8"))]
    return [text for text in texts if text]


def restaurant_guide(count: int) -> list[str]:
    """Short documents, always three on end that describe one restaurant. Those of nano/e2e are left
    out, and so are the names that only its test set has."""
    used = {row[0] for rows in make_splits(0).values() for row in rows}
    rng, texts = random.Random(1), []
    while len(texts) < count:
        mr = random_mr(rng)
        if format_mr(mr) not in used and mr["name"] not in UNSEEN_NAMES:
            texts.append(realise(mr, rng))
            texts += [" " + realise(mr, rng) for _ in range(2)]
    return texts[:count]


def train_tokenizer(texts: list[str], vocab_size: int, special: list[str], out: Path) -> None:
    """Byte-level BPE in GPT-2's and RoBERTa's two files, vocab.json and merges.txt."""
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.model.save(str(out))


def hf_config(family: str, args: argparse.Namespace) -> dict:
    """The content of config.json."""
    if family == "gpt2":
        return dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=args.vocab,
            n_embd=args.width, n_layer=args.layers, n_head=args.heads, n_positions=args.length,
            n_ctx=args.length, activation_function="gelu_new", layer_norm_epsilon=1e-5,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    return dict(
        architectures=["RobertaForMaskedLM"], model_type="roberta", vocab_size=args.vocab,
        hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        intermediate_size=4 * args.width, max_position_embeddings=args.length + 2,
        hidden_act="gelu", layer_norm_eps=1e-5, type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip


def pack(tokenizer: Tokenizer, texts: list[str], config: Config, length: int) -> torch.Tensor:
    """All texts as one stream of tokens, cut into what the loss takes. GPT-2: (blocks, length + 1),
    with the end-of-text token after each document. RoBERTa: (blocks, length), where a block starts
    with <s>, and </s></s> parts documents as it parts the two sentences of a pair."""
    encoder = config.family == "roberta"
    end = [config.eos] * (2 if encoder else 1)
    ids = np.concatenate([[*tokenizer.encode(t), *end] for t in tqdm(texts, "encode")])
    size = length - 1 if encoder else length + 1
    blocks = torch.from_numpy(ids[: len(ids) // size * size]).view(-1, size)
    return F.pad(blocks, (1, 0), value=config.bos) if encoder else blocks


class MaskedLM(Transformer):
    """RoBERTa with its head for masked tokens, whose last projection is the token embedding plus a
    bias."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, head="none")
        D = config.d_model
        self.head = nn.ModuleDict({"dense": nn.Linear(D, D), "norm": norm(config)})
        self.head.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, h: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (..., D) -> (..., vocabulary)."""
        h = self.head["norm"](F.gelu(self.head["dense"](h)))
        return F.linear(h, self.embed.weight, self.head.bias)


def init_weights(model: Transformer) -> None:
    """Normal, with zero biases. GPT-2: deviation 0.02, smaller where a residual branch ends.
    RoBERTa, whose norms come after the branches: 0.05, as the model is narrow, and positions as
    sinusoids (Vaswani et al., 2017), from which it is a small step to look at a neighbour."""
    gpt2 = model.config.family == "gpt2"
    for name, p in model.named_parameters():
        if p.dim() == 2:
            ends = gpt2 and re.search(r"attn\.o|mlp\.down", name)
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if ends else 0.02 if gpt2 else 0.05
            torch.nn.init.normal_(p, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    if not gpt2:
        n, d = model.positions.weight.shape
        angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        waves = torch.cat([angle.sin(), angle.cos()], dim=1) * 0.05 * math.sqrt(2)
        model.positions.weight.data.copy_(waves)


def block_length(family: str, done: float) -> int:
    """Into pieces of how many tokens a block is cut when a share `done` of the steps is over.

    RoBERTa begins with short ones. Over 256 tokens attention starts out so thin that in our trials
    masked tokens were predicted from their frequency alone for as long as we looked, 1,000 steps.
    """
    stages = ((0.25, 32), (0.4, 64), (0.6, 128)) if family == "roberta" else ()
    return next((length for end, length in stages if done < end), 10**9)


HF_NAMES = {  # our name of a module -> theirs, in this order
    "gpt2": {
        "embed": "wte", "positions": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2",
        "layers.blocks": "h", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    "roberta": {
        "head.norm": "lm_head.layer_norm", "head": "lm_head",
        "embed": "roberta.embeddings.word_embeddings",
        "positions": "roberta.embeddings.position_embeddings",
        "token_type": "roberta.embeddings.token_type_embeddings",
        "norm": "roberta.embeddings.LayerNorm", "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm", "layers.blocks": "roberta.encoder.layer",
        "attn.q": "attention.self.query", "attn.k": "attention.self.key",
        "attn.v": "attention.self.value", "attn.o": "attention.output.dense",
        "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
    },
}  # fmt: skip


def save_hf(model: Transformer, out: Path, config: dict) -> None:
    """The inverse of model.convert, in float16."""
    ours, theirs, gpt2 = model.state_dict(), {}, model.config.family == "gpt2"
    for name, w in ours.items():
        if gpt2 and re.search(r"attn\.[kv]\.", name):
            continue
        if gpt2 and ".attn.q." in name:
            w = torch.cat([ours[name.replace(".q.", f".{part}.")] for part in "qkv"])
            name = name.replace(".q.", ".c_attn.")
        for old, new in HF_NAMES[model.config.family].items():
            name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name)
        matrix = gpt2 and re.search(r"\.(attn|mlp)\..*weight$", name)
        theirs[name] = (w.t() if matrix else w).to(torch.float16).contiguous()
    save_file(theirs, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    back = convert(read_weights(out), read_config(out))
    assert all(torch.equal(back[n], w.half()) for n, w in ours.items()), "not what was saved"


def language_loss(model: Transformer, blocks: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mean loss in nats over the tokens to predict: all of them, or RoBERTa's masked ones, of which
    80% are replaced by <mask>, 10% by a random token and 10% not at all."""
    if model.config.family == "gpt2":
        h, target = model.hidden(blocks[:, :-1]), blocks[:, 1:]
    else:
        special = len(SPECIAL["roberta"])
        dice, fate = torch.rand(2, *blocks.shape, generator=rng)
        chosen = (dice < MASK_SHARE) & (blocks >= special)
        other = torch.randint(special, model.config.vocab_size, blocks.shape, generator=rng)
        ids = torch.where(chosen & (fate < 0.9), other, blocks)
        ids = torch.where(chosen & (fate < 0.8), SPECIAL["roberta"].index("<mask>"), ids)
        h, target = model.hidden(ids)[chosen], blocks[chosen]
    return F.cross_entropy(model.logits(h).flatten(0, -2).float(), target.flatten())


@torch.no_grad()
def validation_loss(model: Transformer, blocks: torch.Tensor) -> float:
    """The same over held-out blocks, always with the same masks."""
    rng = torch.Generator().manual_seed(0)
    model.eval()
    losses = [language_loss(model, b, rng) for b in blocks.split(16)]
    model.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of *.txt files")
    parser.add_argument("--guide", type=int, default=45_000, help="documents from the grammar")
    parser.add_argument("--family", choices=[*SPECIAL], default="gpt2")
    parser.add_argument("--out", type=Path, help="default: nano/gpt2 or nano/roberta")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps until the full rate")
    args = parser.parse_args()
    torch.manual_seed(0)
    out = args.out or Path("nano") / args.family
    hf = hf_config(args.family, args)
    config = Config(**our_config(hf))

    texts = documents(args.text) + restaurant_guide(args.guide)
    out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        train_tokenizer(texts, args.vocab, SPECIAL[args.family], out)
    blocks = pack(Tokenizer.load(out, config), texts, config, args.length)
    held_out = torch.arange(len(blocks)) % 50 == 0  # 2%, spread over all sources
    train, valid = blocks[~held_out], blocks[held_out]

    model = Transformer(config) if config.causal else MaskedLM(config)
    init_weights(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    first, last = 0, out / "last.pt"
    if args.resume:
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {train.numel():,} tokens")

    log = open(out / "log.txt", "a")
    started = time.time()
    for step in tqdm(range(first, args.steps), "pretrain", initial=first, total=args.steps):
        epoch, place = divmod(step * args.batch, len(train) // args.batch * args.batch)
        if place == 0 or step == first:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        batch = train[order[place : place + args.batch]]
        length = min(batch.shape[1], block_length(args.family, step / args.steps))
        batch = batch.reshape(-1, length)
        warm, left = (step + 1) / args.warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(warm, 0.05 + 0.95 * left)
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_loss(model, batch, torch.Generator().manual_seed(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            held = validation_loss(model, valid.reshape(-1, length))
            seconds = time.time() - started
            print(f"step {step + 1} loss {held:.4f} after {seconds:.0f} s", file=log, flush=True)
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            torch.save(state, last.with_suffix(".tmp"))
            last.with_suffix(".tmp").replace(last)
            save_hf(model, out, hf)
    print(f"validation loss {held:.3f} nats a token, perplexity {math.exp(held):.1f}")


if __name__ == "__main__":
    command_line(main)
