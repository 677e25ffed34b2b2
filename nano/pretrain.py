"""Train a small byte-level BPE and pretrain a small GPT-2 on a folder of plain text.

It wrote nano/gpt2, the model that `python train.py` fine-tunes by default: a checkpoint in the
Hugging Face layout (float16) that model.py, and transformers, load like any other.

A model of 2M parameters that has read only newspapers has no words for restaurants and no habit of
repeating, after an end-of-text token, a name that it met before. So --guide adds plain text from
the grammar of make_e2e.py, where three documents in a row describe one restaurant in different
words. There are no meaning representations in it, and none of the restaurants of nano/e2e.

    pip install -r requirements-dev.txt                      # for `tokenizers`
    python nano/pretrain.py --text DIR --out nano/gpt2       # DIR holds *.txt
    python nano/pretrain.py --text DIR --out nano/gpt2 --resume     # after a kill, from OUT/last.pt
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Tokenizer  # noqa: E402
from eval import command_line  # noqa: E402
from model import Config, InputError, Transformer, convert, read_config, read_tensors  # noqa: E402
from nano.make_e2e import UNSEEN_NAMES, format_mr, make_splits, random_mr, realise  # noqa: E402

END = "<|endoftext|>"


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


def train_tokenizer(texts: list[str], vocab_size: int, out: Path) -> None:
    """Byte-level BPE in GPT-2's two files, vocab.json and merges.txt; id 0 ends a document."""
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    bpe.model.save(str(out))


def init_weights(model: Transformer) -> None:
    """GPT-2's: normal with deviation 0.02, smaller where a residual branch ends; zero biases."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            ends = re.search(r"attn\.o|mlp\.down", name)
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if ends else 0.02
            torch.nn.init.normal_(p, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)


def save_hf(model: Transformer, out: Path, config: dict) -> None:
    """The inverse of model.convert for GPT-2, in float16."""
    ours, theirs = model.state_dict(), {}
    names = {"embed": "wte", "positions": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2",
             "layers.blocks": "h", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc",
             "mlp.down": "mlp.c_proj"}  # fmt: skip
    for name, w in ours.items():
        if re.search(r"attn\.[kv]\.", name):
            continue
        if ".attn.q." in name:
            w = torch.cat([ours[name.replace(".q.", f".{part}.")] for part in "qkv"])
            name = name.replace(".q.", ".c_attn.")
        for old, new in names.items():
            name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name)
        matrix = re.search(r"\.(attn|mlp)\..*weight$", name)
        theirs[name] = (w.t() if matrix else w).to(torch.float16).contiguous()
    save_file(theirs, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    back = convert(read_tensors(out), read_config(out))
    assert all(torch.equal(back[n], w.half()) for n, w in ours.items()), "not what was saved"


@torch.no_grad()
def validation_loss(model: Transformer, blocks: torch.Tensor) -> float:
    """Mean next-token loss in nats over (blocks, length + 1) ids."""
    model.eval()
    losses = [
        F.cross_entropy(model(b[:, :-1]).flatten(0, 1).float(), b[:, 1:].flatten())
        for b in blocks.split(16)
    ]
    model.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of *.txt files")
    parser.add_argument("--guide", type=int, default=45_000, help="documents from the grammar")
    parser.add_argument("--out", type=Path, default=Path("nano/gpt2"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    hf = dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=args.vocab,
        n_embd=args.width, n_layer=args.layers, n_head=args.heads, n_positions=args.length,
        n_ctx=args.length, activation_function="gelu_new", layer_norm_epsilon=1e-5,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config = Config.from_hf(hf)

    texts = documents(args.text) + restaurant_guide(args.guide)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        train_tokenizer(texts, args.vocab, args.out)
    tokenizer = Tokenizer.from_folder(args.out, config)
    ids = np.concatenate([[*tokenizer.encode(t), config.eos] for t in tqdm(texts, "encode")])
    usable = len(ids) // (args.length + 1) * (args.length + 1)
    blocks = torch.from_numpy(ids[:usable]).view(-1, args.length + 1)
    held_out = torch.arange(len(blocks)) % 50 == 0  # 2%, spread over all sources
    train, valid = blocks[~held_out], blocks[held_out]

    model = Transformer(config)
    init_weights(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    first, last = 0, args.out / "last.pt"
    if args.resume:
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {train.numel():,} tokens")

    log = open(args.out / "log.txt", "a")
    started = time.time()
    for step in tqdm(range(first, args.steps), "pretrain", initial=first, total=args.steps):
        epoch, place = divmod(step * args.batch, len(train) // args.batch * args.batch)
        if place == 0 or step == first:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        batch = train[order[place : place + args.batch]]
        warm, left = (step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(warm, 0.05 + 0.95 * left)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            held = validation_loss(model, valid)
            seconds = time.time() - started
            print(f"step {step + 1} loss {held:.4f} after {seconds:.0f} s", file=log, flush=True)
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            torch.save(state, last.with_suffix(".tmp"))
            last.with_suffix(".tmp").replace(last)
            save_hf(model, args.out, hf)
    print(f"validation loss {held:.3f} nats a token, perplexity {math.exp(held):.1f}")


if __name__ == "__main__":
    command_line(main)
