"""What MoLEx costs at inference beside LoRA alone: Table 14 and appendix E.4 of the MoLEx paper.

The paper fine-tunes Llama-3.2-1B on Alpaca and finds, for LoRA: 1,236,666,368 parameters, 851,968
of them trainable (0.0689 %), 10,442 MB of memory, 12.329 TFLOP and 0.506 s a sample, 24.366 TFLOP a
second, 4:59 minutes an epoch. For MoLEx: 1,236,699,152 parameters, 884,752 trainable (0.0715 %),
the same memory, 22.511 TFLOP and 0.557 s a sample, 40.415 TFLOP a second, 6:00 minutes an epoch:
almost twice the FLOP in little more time, as the two layers of a slot run side by side.

This counts Llama-3.2-1B exactly on the meta device (shapes, no weights), then measures --model:
LoRA and MoLEx take turns (a, b, a, b, ...) over the same weights; medians, after one pass each to
warm up. On the CPU the two layers run one after the other; side by side they run on CUDA alone.

    python experiments/table14_efficiency.py                          nano/gpt2, about ten seconds
    python experiments/table14_efficiency.py --model meta-llama/Llama-3.2-1B --tokens 4096 --batch 1

Where the paper is silent:

- LoRA has r = 8 on q and v and is not merged, a sample 4,096 tokens: that gives its counts. FLOP
  are those of matrix products; attention's include the half that the causal mask hides.
- MoLEx's trainable parameters follow from section 2.2: LoRA's and those of a linear gate, W z + b,
  that all slots share, 2048 * 16 + 16 = 32,784; together 884,752. A learned alpha would add one.
- A slot whose gate picks the slot's own layer runs it once, not twice. So MoLEx has two bounds;
  the measured run counts what its gate, which is new and untrained, did pick. FLOP always come from
  the meta device, because the counter overlooks the fused attention of the CPU.
- The input is random ids, one pass, no generation. Precision is train.py's: float32 on the CPU; on
  CUDA bfloat16 for the frozen layers and the products.
- Memory is torch's peak on CUDA in MB of 10^6 bytes. On the CPU it is "-": torch keeps no count
  there, and for a small model the process is mostly Python and torch.
- An epoch is Alpaca's 52,002 examples, each one sample of --tokens, one after the other. The
  paper's must be another: 4:59 minutes are only 591 times its 0.506 s.
"""

import statistics
import sys
import time
import tomllib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lora import add_lora
from model import Config, Context, Transformer, load
from molex import MoLEx, MoLExConfig, upcycle
from support import settings
from support.checkpoints import our_config
from support.cli import Parser, at_least, command_line, pick_device, progress_bar

LLAMA = tomllib.loads(Path(__file__).with_name("shapes.toml").read_text("utf-8"))["Llama-3.2-1B"]
LORA = dict(r=8, alpha=32)
ALPACA = 52_002  # examples in tatsu-lab/alpaca
HEADER = ["parameters", "trainable", "%", "MB", "FLOP/sample", "s/sample", "FLOP/s", "min/epoch"]
PAPER = settings.PAPER["table14"]


class FixedRoute(MoLEx):
    """Layer route[t] joins slot t, whatever the gate says: meta tensors have no values to vote."""

    def __init__(self, blocks: nn.ModuleList, d_model: int, route: list[int]) -> None:
        super().__init__(blocks, d_model, MoLExConfig())
        self.route = route

    def mix(self, t: int, z: Tensor, ctx: Context) -> Tensor:
        self.gates[self.gate_of(t)](z)  # its FLOP count
        own, j = self.blocks[t](z, ctx, (t, t)), self.route[t]
        other = self.blocks[j](z, ctx, (t, j)) if j != t else own
        return own + (1 - self.alpha(t)) * (other - own)


def count(config: Config, tokens: int, route: list[int] | None) -> tuple[int, int, int]:
    """Parameters, trainable ones and FLOP of a pass over one sample of `tokens` tokens. `route`:
    which layer joins each slot; None: LoRA alone. InputError if the model has fewer positions."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = add_lora(Transformer(config), **LORA)
        if route is not None:
            model.layers = FixedRoute(model.layers.blocks, config.d_model, route)
        model.eval()(torch.zeros(1, tokens, dtype=torch.long))
    total, trainable = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or not only)
        for only in (False, True)
    )
    return total, trainable, counter.get_total_flops()


@torch.no_grad()
def measure(
    model: Transformer, stacks: dict[str, nn.Module], ids: Tensor, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Seconds of each pass over ids (B, N), and peak memory in bytes (None on the CPU), of every
    one of the `stacks` of layers. They take turns in the model; a first round is not timed."""
    seconds, peak = {name: [] for name in stacks}, {}
    for _ in progress_bar(range(rounds + 1), "measure", leave=False):
        for name, model.layers in stacks.items():
            if ids.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with model.autocast():
                model(ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            peak[name] = torch.cuda.max_memory_allocated() if ids.is_cuda else None
    return {name: s[1:] for name, s in seconds.items()}, peak


def si(x: float) -> str:
    """12329240494080 -> "12.329 T"."""
    size, prefix = (1e12, "T") if x >= 1e11 else (1e9, "G")
    return f"{x / size:.3f} {prefix}"


def row(
    total: int, trainable: int, flop: int, seconds: float | None = None, memory: int | None = None
) -> list[str]:
    """The cells under HEADER; "-" for what was not measured. `seconds` are those of a sample."""
    cells = [f"{total:,}", f"{trainable:,}", f"{100 * trainable / total:.4f}"]
    cells += ["-" if memory is None else f"{memory / 1e6:,.0f}", si(flop)]
    if seconds is None:
        return [*cells, "-", "-", "-"]
    minutes, rest = divmod(round(ALPACA * seconds), 60)
    return [*cells, f"{seconds:.3g}", si(flop / seconds), f"{minutes}:{rest:02}"]


def print_table(title: str, rows: dict[str, list[str]]) -> None:
    print(f"\n{title}\n{'':33}" + "".join(f"{h:>14}" for h in HEADER))
    for label, cells in rows.items():
        print(f"{label:33}" + "".join(f"{cell:>14}" for cell in cells))


def bounds(config: Config, tokens: int) -> dict[str, list[str]]:
    """Rows of MoLEx at its most and at its least expensive (K = 1)."""
    T = config.n_layer
    return {
        "MoLEx, all slots add another": row(*count(config, tokens, [*range(1, T), 0])),
        "MoLEx, all slots pick their own": row(*count(config, tokens, [*range(T)])),
    }


def main() -> None:
    parser = Parser(description="Table 14: parameters, FLOP, time and memory of LoRA and of MoLEx")
    parser.add_argument("--model", default="nano/gpt2", help="to measure: a folder or a hub name")
    parser.add_argument("--tokens", type=at_least(1), default=256, help="in a sample")
    parser.add_argument("--batch", type=at_least(1), default=1, help="samples in a pass")
    parser.add_argument(
        "--rounds", type=at_least(1), default=20, help="timed passes of each method"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()

    torch.manual_seed(0)
    device, model = pick_device(args.device), load(args.model)
    config, T = model.config, model.config.n_layer
    lora = count(config, args.tokens, None)  # first: it says so if there are too many tokens
    llama = Config(**our_config(LLAMA))
    ours = {"LoRA": row(*count(llama, 4096, None)), "MoLEx, paper": PAPER["MoLEx"]}
    title = "Llama-3.2-1B, samples of 4,096 tokens, counted on the meta device"
    print_table(title, {"LoRA, paper": PAPER["LoRA"], **ours, **bounds(llama, 4096)})

    plain = add_lora(model.to(device), **LORA).layers
    molex = upcycle(model).layers  # over the same blocks
    model.cast_frozen()
    ids = torch.randint(config.vocab_size, (args.batch, args.tokens)).to(device)
    seconds, peak = measure(model, {"LoRA": plain, "MoLEx": molex}, ids, args.rounds)
    each = {name: statistics.median(s) / args.batch for name, s in seconds.items()}
    route = molex.routes.counts.argmax(1).tolist()  # the same ids in all rounds, so the same choice
    chosen, others = count(config, args.tokens, route), sum(j != t for t, j in enumerate(route))
    rows = {
        "LoRA": row(*lora, each["LoRA"], peak["LoRA"]),
        f"MoLEx, {others} of {T} slots add another": row(*chosen, each["MoLEx"], peak["MoLEx"]),
    }
    title = f"{args.model}, samples of {args.tokens:,} tokens, {args.batch} a pass, on {device}"
    print_table(title, {**rows, **bounds(config, args.tokens)})
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    print(f"\nMoLEx takes {ratio:.2f} x LoRA's time and {chosen[2] / lora[2]:.2f} x its FLOP.")


if __name__ == "__main__":
    command_line(main)
