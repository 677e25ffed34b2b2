"""How fast this is beside what people would otherwise use: transformers with peft.

Contenders are transformers + peft with LoRA, ours with LoRA, and ours with LoRA + MoLEx in the
first 12 slots and in all of them; on CUDA, or with --on-device, also MoLEx with the choice on the
device, and on CUDA LoRA and that as CUDA graphs (captured before the clock starts). They have the
same weights, the same LoRA (written by `lora.save_lora`, read by peft), the same batches and the
same precision, and take turns in one process (a, b, c, d, then d, c, b, a, ...); medians with the
lowest and the highest, after one round to warm up. Ratios are medians of each round's ratio, so
what slows the whole machine for a while does not count.

    python experiments/speed.py                          nano/gpt2 on the CPU, a minute or two
    python experiments/speed.py --models nano/gpt2 DIR --data E2E       and a checkpoint folder
    python experiments/speed.py --models random:gpt2-medium random:roberta-base

On CUDA it also takes, unasked, the shapes of gpt2-medium, roberta-base and Llama-3.2-1B with random
weights, which transformers makes on the spot. Without transformers and peft (requirements-dev.txt)
their rows, and these shapes, are left out, which it says.

What is measured:

- training: train.py's own step (forward, loss with label smoothing, backward, AdamW) on batches of
  8 of E2E, or of random ids of like lengths for a shape; tokens a second without padding. The
  learning rate is 0, where the warm-up starts, so all steps have the same weights. Theirs is the
  same step over transformers, with its trainer's fused AdamW, on the logits of the whole text.
- inference: 16 x 128 random ids without a cache, the logits of the last token (RoBERTa: labels);
  the LoRA is not merged.
- beam-10: answers to the same prompts, with `generate` in the same batch and one prompt at a time,
  as the public LoRA code does. The LoRA is merged and has learned E2E for --fit steps, so that
  answers end; no n-gram is banned (theirs would look in the prompt, too). How many answers are
  those of our LoRA, and how many tokens they have, stands beside the time: MoLEx, whose gate is
  not trained, writes others, so its time is not to be compared.
- memory: the most that a training step holds beyond what is there before it (weights and the
  optimizer's state), of torch's tensors. On the CPU this is the running sum of all that torch's
  profiler saw allocated and freed in one step, which, unlike the process's resident set, does not
  depend on what malloc keeps; buffers inside the matrix library are not in it. On CUDA it is the
  allocator's own peak.
- launches and waits of a training step. On CUDA they are the profiler's kernel launches and
  synchronisations of host and device. The CPU has neither: there it counts, without the
  optimizer, the operations that compute something, each about a launch on a GPU, and those that
  read a value, for which the CPU would wait (and a few, such as one_hot's check, that a GPU omits).
- FLOP of a training step's matrix products, counted on the real step with plain attention.

So that FLOP do not depend on chance, the gate is made to pick one layer in every slot, the middle
one, as trained gates mostly do: all slots but that layer's own run a second one.

Where precisions differ: in bf16 ours keeps embeddings and norms in float32, theirs does not. For
GPT-2 peft's LoRA is of rank 2r on q, k and v in one, half of it zeros (`lora.fuse`).

Measured on the CPU (one thread of two shared cores, torch 2.13, transformers 5.23, peft 0.21) in
three rounds, as ratios: median (lowest-highest). The machine was busy: no absolute times.

                                            nano/gpt2           SmolLM2-135M        goal
    LoRA over transformers + peft, training 1.34 (1.31-1.34)    1.12 (1.11-1.16)    1.3
    MoLEx over LoRA, time of a step         1.90 (1.28-1.92)    1.95 (1.90-2.69)    its FLOP
    the same, FLOP                          1.81                1.89
    the same, time of inference             2.08 (2.05-2.10)    1.87 (1.41-2.05)
    the same, memory                        1.72                1.83                2
    beam-10 over generate, same batch       3.29 (2.66-3.43)    1.75 (1.12-1.86)    1.6
    the same, one prompt at a time          3.83 (3.78-4.87)    3.54 (3.41-3.76)    3

SmolLM2 with `--prompts 4 --fit 15`. Its training is bound by products of matrices, of which peft
does only 1.15 times as many.

On CUDA this script has not been run yet.
"""

import gc
import importlib.util
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Example, Tokenizer, collate, e2e_prompt, encode_pairs, encode_prompt, read_e2e
from eval import beam_search
from lora import add_lora, load_lora, loras, merge, save_lora
from model import Config, Transformer, load
from molex import MoLExConfig, upcycle
from support.checkpoints import checkpoint_folder
from support.cli import Parser, at_least, command_line, pick_device, progress_bar
from support.files import InputError, make_folder, write_text
from support.settings import Settings
from train import graphed_step, make_optimizer, train_step

SHAPES = tomllib.loads(Path(__file__).with_name("shapes.toml").read_text("utf-8"))  # random weights
Work = tuple[list[list[Example]], list[list[int]]]  # batches of training; prompts
THEIRS, LORA, ALONE = "transformers + peft, LoRA", "LoRA", "the same, one prompt at a time"
LABELS, SEED = 2, 0
BEAM = dict(beams=10, length_penalty=0.9, no_repeat_ngram=0)
NO_DROPOUT = "attn_pdrop embd_pdrop resid_pdrop hidden_dropout_prob".split()
NO_DROPOUT += "attention_probs_dropout_prob attention_dropout".split()


# --------------------------------------------------------------------------------- the contenders


class Ours:
    """This project's model with the LoRA in peft's files; `slots` mix, None: without MoLEx."""

    def __init__(
        self,
        folder: Path,
        lora: Path,
        slots: int | None,
        device: torch.device,
        precision: str | None,
        on_device: bool = False,
        graphs: bool = False,
    ) -> None:
        molex = MoLExConfig(layers=tuple(range(slots)), on_device=on_device) if slots else None
        self.settings = Settings(str(folder), "e2e", None, SEED, molex)
        self.graphs, self.graphed = graphs, None
        model = load(folder, head=head_of(folder), dropout=0.0)
        model.precision = precision
        load_lora(model, lora)
        if molex:
            torch.manual_seed(SEED)
            upcycle(model, molex)
            with torch.no_grad():
                model.layers.gates[0].bias[model.config.n_layer // 2] += 1000.0
        self.model = model.to(device).eval()
        model.cast_frozen()

    def optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.settings, 1000)[0]

    def loss(self, examples: list[Example]) -> Tensor:
        total = self.model.loss(collate(examples), self.settings.label_smoothing)
        return total / sum(e.targets for e in examples)

    def step(self, optimizer: torch.optim.Optimizer, examples: list[Example]) -> None:
        if not self.graphs:
            train_step(self.model, optimizer, examples, self.settings)
            return
        if self.graphed is None or self.graphed.optimizer is not optimizer:
            self.graphed = graphed_step(self.model, optimizer, self.settings)
        self.graphed(examples)

    @torch.no_grad()
    def infer(self, ids: Tensor) -> Tensor:
        with self.model.autocast():
            h = self.model.hidden(ids)
            return self.model.logits(h if head_of(self.model) == LABELS else h[:, -1])

    def merge(self) -> None:
        merge(self.model)

    def answer(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        with self.model.autocast():
            how = BEAM | dict(max_new_tokens=new_tokens)
            return beam_search(self.model, prompts, end(self.model), **how)


class Theirs:
    """The same of transformers and peft."""

    graphs = False

    def __init__(self, folder: Path, lora: Path, device: torch.device, precision: str) -> None:
        import peft  # slow to import, and not needed to use the project
        import transformers as hf

        hf.logging.set_verbosity_error()
        hf.logging.disable_progress_bar()
        config = hf.AutoConfig.from_pretrained(folder)
        for name in NO_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        self.device, self.bf16 = device, precision == "bf16"
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        kind = hf.AutoModelForCausalLM
        if head_of(folder) == LABELS:
            kind = hf.AutoModelForSequenceClassification
        base = kind.from_pretrained(folder, config=config, dtype=dtype)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between these two
            self.model = peft.PeftModel.from_pretrained(base, lora, is_trainable=True)
        if head_of(folder) == LABELS:  # the adapter's own head, which is trained, too
            base.classifier.modules_to_save.float()
        self.model.to(device).eval()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.0, fused=True)

    def loss(self, examples: list[Example]) -> Tensor:
        batch = collate(examples).to(self.device)
        with self.autocast():
            logits = self.model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        if logits.dim() == 3:
            logits = logits.flatten(0, 1)
        logits = logits[batch.where].float()
        return F.cross_entropy(logits, batch.target, label_smoothing=Settings.label_smoothing)

    def step(self, optimizer: torch.optim.Optimizer, examples: list[Example]) -> None:
        self.loss(examples).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def infer(self, ids: Tensor) -> Tensor:
        last = {} if self.model.config.model_type == "roberta" else dict(logits_to_keep=1)
        with self.autocast():
            return self.model(input_ids=ids, use_cache=False, **last).logits.flatten(0, -2)

    def merge(self) -> None:
        self.model = self.model.merge_and_unload()

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        eos, N = end(self.model), max(map(len, prompts))
        ids = torch.tensor([[eos] * (N - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (N - len(p)) + [1] * len(p) for p in prompts])
        how = dict(num_beams=BEAM["beams"], length_penalty=BEAM["length_penalty"])
        how |= dict(do_sample=False, early_stopping=False, max_new_tokens=new_tokens)
        how |= dict(attention_mask=mask.to(self.device), eos_token_id=eos, pad_token_id=eos)
        with self.autocast():
            found = self.model.generate(ids, **how)[:, N:].tolist()
        return [a[: a.index(eos)] if eos in a else a for a in found]


def head_of(model: Path | Transformer) -> str | int:
    """The head that is measured: a decoder's, or a RoBERTa's labels."""
    if isinstance(model, Transformer):
        return LABELS if model.config.family == "roberta" else "lm"
    config = json.loads((model / "config.json").read_text("utf-8"))
    return LABELS if config["model_type"] == "roberta" else "lm"


def end(model: nn.Module) -> int:
    """The token that ends an answer. Random weights write it as seldom as any other."""
    eos = getattr(model.config, "eos", None) or getattr(model.config, "eos_token_id", None)
    return (eos[0] if isinstance(eos, list | tuple) else eos) or 0


def missing() -> list[str]:
    """Which of transformers and peft are not installed."""
    names = ("transformers", "peft")
    return [n for n in names if sys.modules.get(n, ...) is None or not importlib.util.find_spec(n)]


def random_checkpoint(shape: dict, folder: Path) -> Path:
    """A checkpoint of that config.json with random weights, saved by transformers."""
    import transformers as hf

    torch.manual_seed(SEED)
    config = hf.AutoConfig.for_model(**shape)
    kind = hf.AutoModelForCausalLM
    if shape["model_type"] == "roberta":
        kind = hf.AutoModelForSequenceClassification
    kind.from_config(config).save_pretrained(folder)
    return folder


def write_lora(folder: Path, where: Path, fit: list[list[Example]], device: torch.device) -> Path:
    """A LoRA for that checkpoint, Table 6's, in peft's files: after a step on each batch of `fit`,
    or, if there are none, with a random B, so that it matters."""
    torch.manual_seed(SEED)
    model = load(folder, head=head_of(folder))
    add_lora(model, Settings.lora_r, Settings.lora_alpha, Settings.lora_dropout).to(device)
    for lora in loras(model).values() if not fit else ():
        nn.init.normal_(lora.B, std=1e-3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for examples in progress_bar(fit, "fit the LoRA", leave=False):
        model.loss(collate(examples)).div(sum(e.targets for e in examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_lora(model, where)
    return where


def contenders(
    folder: Path,
    device: torch.device,
    precision: str,
    fit: list[list[Example]] = (),
    on_device: bool = False,
) -> dict[str, Ours | Theirs]:
    """All of them by name, over the same weights and the same LoRA; MoLEx in all slots is last."""
    with tempfile.TemporaryDirectory() as temporary:
        lora, found = write_lora(folder, Path(temporary), fit, device), {}
        if not missing():
            found[THEIRS] = Theirs(folder, lora, device, precision)
        found[LORA] = Ours(folder, lora, None, device, precision)
        T, how = found[LORA].model.config.n_layer, (device, precision)
        if device.type == "cuda":
            found["LoRA, graphs"] = Ours(folder, lora, None, *how, graphs=True)
            found["LoRA + MoLEx, graphs"] = Ours(folder, lora, T, *how, True, graphs=True)
        if device.type == "cuda" or on_device:
            found["LoRA + MoLEx, on device"] = Ours(folder, lora, T, *how, True)
        for slots in (12, T) if T > 12 else (T,):
            name = f"LoRA + MoLEx, {'all ' * (slots == T)}{slots} slots"
            found[name] = Ours(folder, lora, slots, *how)
    return found


# ---------------------------------------------------------------------------------------- the data


def texts(folder: Path, data: str, batches: int, size: int, prompts: int) -> Work:
    """Training batches and prompts of E2E, in a fixed random order."""
    tokenizer = Tokenizer.load(folder, Config.load(folder))
    dice = random.Random(SEED)
    pairs = [(e2e_prompt(mr), text) for mr, text in read_e2e(data, "train")]
    examples = encode_pairs(tokenizer, dice.choices(pairs, k=batches * size), 512)
    mrs = sorted({mr for mr, _ in read_e2e(data, "test")})
    asked = [encode_prompt(tokenizer, e2e_prompt(mr)) for mr in dice.choices(mrs, k=prompts)]
    return [examples[i : i + size] for i in range(0, len(examples), size)], asked


def random_texts(c: Config, batches: int, size: int, prompts: int) -> Work:
    """Random ids as long as E2E's texts; for RoBERTa with a label, as long as a pair of GLUE's."""
    dice = random.Random(SEED)

    def ids(low: int, high: int) -> list[int]:
        return [dice.randrange(3, c.vocab_size) for _ in range(dice.randint(low, high))]

    def example() -> Example:
        if c.family == "roberta":
            return Example(ids(32, 64), label=dice.randrange(LABELS))
        return Example(ids(30, 50), ids(15, 40))

    return [[example() for _ in range(size)] for _ in range(batches)], [
        ids(30, 50) for _ in range(prompts)
    ]


# --------------------------------------------------------------------------------------- measuring


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    jobs: dict[str, Callable[[int], object]], rounds: int, device: torch.device, what: str
) -> dict[str, list[float]]:
    """Seconds of job(0), job(1), ... of each, in turns; job(0) once more, before, to warm up."""
    seconds = {name: [] for name in jobs}
    for r in progress_bar(range(-1, rounds), what, leave=False):
        for name, job in [*jobs.items()][:: 1 if r % 2 else -1]:
            wait(device)
            start = time.perf_counter()
            job(max(r, 0))
            wait(device)
            if r >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(job: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the job's worst moment, beyond those before it."""
    gc.collect()
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        job()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))


class Operations(TorchDispatchMode):
    """Counts what would be launches and waits if the tensors were on a GPU."""

    aten = torch.ops.aten
    READ = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}
    INDEX = {aten.index, aten.index_put, aten.index_put_}
    FREE = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        masked = func.overloadpacket in self.INDEX and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        self.waits += masked or func.overloadpacket in self.READ
        self.launches += not func.is_view and func.overloadpacket not in self.READ | self.FREE
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts `Tensor.tolist`, which is no operation of its own on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.waits += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


def launches_and_waits(
    one: Ours | Theirs, examples: list[Example], device: torch.device
) -> tuple[int, int]:
    """Of a training step; see the head of this file for what they are on the CPU."""
    if device.type == "cuda":
        optimizer = one.optimizer()
        for _ in range(1 + 2 * one.graphs):
            one.step(optimizer, examples)
        wait(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            one.step(optimizer, examples)
        names = [e.name() for e in seen.profiler.kineto_results.events()]
        # cudaDeviceSynchronize is the profiler's own, at its end
        waits = names.count("cudaStreamSynchronize") + names.count("cudaEventSynchronize")
        kernels = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
        return sum(n.startswith(kernels) for n in names), waits
    # AdamW would read its own counter of steps, which is on the CPU anyway
    optimizer = torch.optim.SGD([p for p in one.model.parameters() if p.requires_grad], lr=0.0)
    with Operations() as operations, Lists() as lists:
        one.step(optimizer, examples)
    return operations.launches, operations.waits + lists.waits


def flop(one: Ours | Theirs, examples: list[Example]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one.loss(examples).backward()
    one.model.zero_grad()
    return counter.get_total_flops()


def measure(
    models: dict[str, Ours | Theirs],
    batches: list[list[Example]],
    prompts: list[list[int]],
    new_tokens: int,
    device: torch.device,
) -> dict[str, dict]:
    """The rows of the table, name -> what was measured (see `main`); seconds of every round."""
    rows, rounds = {name: {} for name in models}, len(batches)
    for name, one in models.items():
        with torch.no_grad():
            rows[name]["loss"] = one.loss(batches[0]).item()
        rows[name]["flop"] = flop(one, batches[0])
    for one in models.values():
        one.model.train()
    optimizers = {name: one.optimizer() for name, one in models.items()}
    jobs = {
        name: lambda r, one=one, o=optimizers[name]: one.step(o, batches[r])
        for name, one in models.items()
    }
    for name, one in models.items():
        for r in [*range(rounds)] * (2 * one.graphs):  # the second of a shape is captured
            jobs[name](r)
    for name, seconds in take_turns(jobs, rounds, device, "training").items():
        tokens = [sum(map(len, batch)) for batch in batches]
        rows[name] |= dict(training=seconds, training_tokens=tokens)
    for name, one in models.items():
        job = jobs[name]
        rows[name]["memory"] = peak_memory(lambda job=job: job(0), device)
        rows[name]["launches"], rows[name]["waits"] = launches_and_waits(one, batches[0], device)

    for one in models.values():
        one.model.eval()
    vocab_size = models[LORA].model.config.vocab_size
    ids = torch.randint(3, vocab_size, (16, 128), generator=torch.Generator().manual_seed(SEED))
    ids = ids.to(device)
    jobs = {name: lambda _, one=one: one.infer(ids) for name, one in models.items()}
    for name, seconds in take_turns(jobs, rounds, device, "inference").items():
        rows[name] |= dict(inference=seconds, inference_tokens=[ids.numel()] * rounds)
    if head_of(models[LORA].model) == LABELS:
        return rows

    answers = {}
    for one in models.values():
        one.merge()

    def batch(name: str) -> Callable[[int], None]:
        return lambda _: answers.update({name: models[name].answer(prompts, new_tokens)})

    def alone(_: int) -> None:
        answers[ALONE] = [models[THEIRS].answer([p], new_tokens)[0] for p in prompts]

    jobs = {name: batch(name) for name in models}
    if THEIRS in models:
        jobs[ALONE], rows = alone, {THEIRS: rows[THEIRS], ALONE: {}, **rows}
    for name, seconds in take_turns(jobs, rounds, device, "beam search").items():
        same = sum(a == b for a, b in zip(answers[name], answers[LORA], strict=True))
        rows[name] |= dict(beam=seconds, beam_tokens=sum(map(len, answers[name])), same=same)
    return rows


# ----------------------------------------------------------------------------------------- results

TIMES = {"training": "training, tokens/s", "inference": "inference, tokens/s"}
TIMES |= {"beam": "beam-10, s", "beam_tokens": "tokens", "same": "same answers"}
STEP = {"memory": "memory, MB", "launches": "launches", "waits": "waits"}
STEP |= {"flop": "GFLOP", "loss": "loss"}
MOLEX = "MoLEx in all slots over LoRA"
GOALS = {  # what -> device -> goal; a number with its model, where it is set for one
    "LoRA over transformers + peft, training": {"cpu": "1.3", "cuda": "1.5"},
    "beam-10 over generate, same batch": {"cpu": "1.6"},
    "beam-10 over generate, one prompt at a time": {"cpu": "3"},
    f"{MOLEX}, time of a training step": {"cpu": "FLOP", "cuda": "1.5 random:gpt2-medium"},
    f"{MOLEX}, time of inference": {"cuda": "1.25 random:roberta-base"},
    f"{MOLEX}, memory in training": {"cpu": "2", "cuda": "2"},
}


def ratios(rows: dict[str, dict]) -> dict[str, list[float]]:
    """What GOALS speak of, one number for each round."""
    last = [*rows][-1]  # MoLEx in all slots

    def over(a: str, b: str, key: str) -> list[float]:
        """b's seconds over a's: how much faster a is."""
        if key not in rows.get(a, {}) or key not in rows.get(b, {}):
            return []
        return [y / x for x, y in zip(rows[a][key], rows[b][key], strict=True)]

    found = [over(LORA, THEIRS, "training"), over(LORA, THEIRS, "beam"), over(LORA, ALONE, "beam")]
    found += [over(LORA, last, key) for key in ("training", "inference")]
    found.append([rows[last]["memory"] / rows[LORA]["memory"]])
    return dict(zip(GOALS, found, strict=True))


def verdict(what: str, measured: list[float], name: str, device: str, flop: float) -> str:
    """ "1.3 or more: missed". Beside MoLEx's costs a goal is the most, else the least."""
    goal, _, of = GOALS[what].get(device, "").partition(" ")
    if not goal or of and of != name:
        return "no goal here"
    bound, most = (flop if goal == "FLOP" else float(goal)), what.startswith(MOLEX)
    text = f"{bound:.2f}{' (its FLOP)' * (goal == 'FLOP')} or {'less' if most else 'more'}"
    if not measured:
        return f"{text}: not measured"
    middle = statistics.median(measured)
    return f"{text}: {'met' if (middle <= bound if most else middle >= bound) else 'missed'}"


def spread(values: list[float], digits: int) -> str:
    """Median, lowest and highest."""
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low}-{high})"


def cell(row: dict, key: str) -> str:
    if key not in row:
        return "-"
    value = row[key]
    if key in ("training", "inference"):
        tokens = row[key + "_tokens"]
        return spread([n / s for n, s in zip(tokens, value, strict=True)], 0)
    if key == "beam":
        return spread(value, 2)
    if key == "loss":
        return f"{value:.4f}"
    size = {"memory": 1e6, "flop": 1e9}.get(key)
    return f"{value / size:,.1f}" if size else f"{value:,}"


def report(name: str, device: str, rows: dict[str, dict]) -> None:
    """Print the table of a model, and the goals beside what was measured."""
    width = max(map(len, [*rows, *GOALS]))
    for columns in (TIMES, STEP):
        print(f"\n{'':{width}}" + "".join(f"{title:>24}" for title in columns.values()))
        for label, row in rows.items():
            if columns is TIMES or label != ALONE:
                print(f"{label:{width}}" + "".join(f"{cell(row, key):>24}" for key in columns))
    by_flop = rows[[*rows][-1]]["flop"] / rows[LORA]["flop"]
    print(f"\n{'':{width}}{'measured':>24}  goal")
    for what, measured in ratios(rows).items():
        text = spread(measured, 2) if measured else "-"
        print(f"{what:{width}}{text:>24}  {verdict(what, measured, name, device, by_flop)}")


def main() -> None:
    parser = Parser(description="Speed and memory beside transformers + peft")
    shapes = ", ".join(f"random:{shape}" for shape in SHAPES)
    what = f"folders, hub names, or of {shapes} (nano/gpt2; on CUDA these, too)"
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=what)
    parser.add_argument("--data", default="nano/e2e", help="folder of E2E's files (%(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="timed, of each contender")
    parser.add_argument("--batch", type=at_least(1), default=8, help="sequences of a step")
    parser.add_argument("--prompts", type=at_least(1), default=8, help="answered together")
    parser.add_argument("--new-tokens", type=at_least(1), default=64, help="longest answer")
    parser.add_argument("--fit", type=at_least(0), default=30, help="steps on E2E before that")
    what = "of matrix products (default: on CUDA bf16)"
    parser.add_argument("--precision", choices=["bf16", "float32"], help=what)
    parser.add_argument("--on-device", action="store_true", help="also MoLEx's choice there")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"), help="(%(default)s)")
    args = parser.parse_args()
    make_folder(args.out.parent)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    precision = args.precision or ("bf16" if cuda else "float32")
    names = args.models or ["nano/gpt2", *(f"random:{shape}" for shape in SHAPES if cuda)]
    for name in names:
        if name.startswith("random:") and name.removeprefix("random:") not in SHAPES:
            raise InputError(f"{name} is none of {shapes}")
    versions = dict(torch=torch.__version__, python=platform.python_version())
    if lack := missing():
        print(f"not installed: {', '.join(lack)} (pip install -r requirements-dev.txt)")
        print("the rows of transformers + peft are left out")
    else:
        import peft
        import transformers

        versions |= dict(transformers=transformers.__version__, peft=peft.__version__)
    machine = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} thread(s)"
    made = dict(device=device.type, machine=machine, precision=precision, versions=versions)
    made |= {name: getattr(args, name) for name in ("rounds", "batch", "prompts", "new_tokens")}
    made |= dict(fit=args.fit, models={})
    for name in names:
        shape = SHAPES.get(name.removeprefix("random:")) if name.startswith("random:") else None
        if shape and "transformers" in lack:
            print(f"\n{name}: skipped, transformers makes its weights and is not installed")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = random_checkpoint(shape, Path(temporary)) if shape else checkpoint_folder(name)
            size, fit = (args.batch, args.prompts), []
            if shape or head_of(folder) == LABELS:
                batches, prompts = random_texts(Config.load(folder), args.rounds, *size)
            else:
                batches, prompts = texts(folder, args.data, args.rounds + args.fit, *size)
                batches, fit = batches[: args.rounds], batches[args.rounds :]
            models = contenders(folder, device, precision, fit, args.on_device)
        how = f"batches of {args.batch}, {args.prompts} prompts, {args.rounds} rounds"
        print(f"\n{name} on {device.type}, {machine}, {precision}: {how}, median (least-most)")
        rows = measure(models, batches, prompts, args.new_tokens, device)
        report(name, device.type, rows)
        made["models"][name] = dict(rows=rows, ratios=ratios(rows))
        del models
        gc.collect()
        write_text(args.out, json.dumps(made, indent=2) + "\n")  # so far, should the next one fail
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    command_line(main)
