"""Settings, where their values come from, and the command line of train.py.

A setting is a dataclass field with its help and limits (`setting`); each becomes a flag. There are
those of a run (`Settings`) and those of the gate (molex.MoLExConfig). Where a flag is not given,
these count, the later ones more:

    1. the field's default: Table 6, for GPT-2 medium on E2E; on E2E the first 12 slots mix, as
       there, and in GLUE the dropout is the checkpoint's own
    2. what paper.toml has for the task and the model's shape: Table 5, or the embedded models'
    3. what paper.toml has for --tune
    4. what is trained, rank and alpha of the run that --init-from names
"""

import argparse
import hashlib
import json
import math
import re
import reprlib
import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from support.checkpoints import check_dropouts, checkpoint_folder, read_config
from support.cli import Parser, at_least, layer_range, plain_path
from support.files import InputError, check, locate, read_json
from support.processes import say

PAPER = tomllib.loads(Path(__file__).with_name("paper.toml").read_text("utf-8"))
FROM_MNLI = ("mrpc", "rte", "stsb")  # the tasks that Table 9 starts from an MNLI run
NOT_RESULTS = ("on_device", "cuda_graphs")  # how a step is run, not what it computes


def setting(
    default: object, help: str, *choices: str, least: float | None = None, below: float = 1e30
) -> Any:
    """A dataclass field with its help and what it may be: one of `choices`, or a number from
    `least` (if not said 0, or 1 for a whole number whose default is not 0) to less than `below`.
    The default tells which: 1 is whole, 1.0 is not."""
    whole = not isinstance(default, float)
    least = int(whole and default != 0) if least is None else least
    below = min(below, 2**24) if whole else below  # at some larger whole numbers torch overflows
    metadata = dict(help=help, choices=choices, least=least, below=below)
    return field(default=default, metadata=metadata)


def kinds(f: Field) -> set[type]:
    """The types that a field's value may have; a whole number may stand for any number."""
    parts = get_args(f.type) or [f.type]
    found = {get_origin(part) or part for part in parts}  # of tuple[int, ...] it is tuple
    if float in found:
        found.add(int)
    if tuple in found:
        found.add(list)
    return found


def check_fields(values: object, where: str = "") -> None:
    """Raise InputError unless every field of a dataclass has its type, is among its choices and
    within its limits; `where` precedes the field's name in the message."""
    for f in fields(values):
        value, limits = getattr(values, f.name), f.metadata
        what = f"{where}{f.name.replace('_', '-')}"
        allowed = kinds(f)
        if Any not in allowed and type(value) not in allowed:  # a bool is no number here
            raise InputError(f"{what} cannot be {reprlib.repr(value)}")
        if not limits or value is None:
            continue
        if limits["choices"] and value not in limits["choices"]:
            known = " or ".join(limits["choices"])
            raise InputError(f"{what} is {reprlib.repr(value)}, not {known}")
        if type(value) in (int, float) and not limits["least"] <= value < limits["below"]:
            bounds = f"{limits['least']} or more"
            if limits["below"] < 2**24:
                bounds += f", less than {limits['below']:g}"
            raise InputError(f"{what} cannot be {reprlib.repr(value)}: it is {bounds}")


def from_json(cls: type, values: object, where: object, **nested: type) -> Any:
    """A dataclass of settings from a dictionary in a file, and with `nested` those in its fields.
    What the file lacks takes its default, so that older runs stay readable; what no field knows is
    left out. Raises InputError."""
    check(values, {}, where)
    found = {}
    for f in fields(cls):
        if f.name in values:
            value = values[f.name]
            if f.name in nested and value is not None:
                value = from_json(nested[f.name], value, f"{where}, {f.name}")
            found[f.name] = tuple(value) if isinstance(value, list) else value
        elif f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where} lacks {f.name}")
    made = cls(**found)
    check_fields(made, f"{where}: ")
    return made


@dataclass(frozen=True)
class Settings:
    """Everything needed to repeat a run."""

    model: str
    task: str
    data: str | None
    seed: int
    molex: Any  # the gate's settings, a MoLExConfig; None: without MoLEx
    init: str | None = None  # a run, or a .bin file, to start from
    shape: str = ""  # the model of [models] in paper.toml that has this one's shape
    differs: dict = field(default_factory=dict)  # setting -> [ours, the paper's]
    tune: str = setting("lora", "or train every weight, or every bias", "lora", "full", "bitfit")
    epochs: int = setting(5, "passes over the training set")
    max_steps: int | None = setting(None, "stop, and end the decay, after so many optimizer steps")
    batch_size: int = setting(8, "sequences per optimizer step, over all processes")
    accumulate: int = setting(1, "micro-batches in a step, to save memory; each votes for itself")
    length_groups: int = setting(1, "batches in which like lengths are put together; 1: at random")
    lr: float = setting(2e-4, "learning rate of all but the gate, linear warm-up and decay")
    weight_decay: float = setting(0.01, "of the same, biases and norms excepted")
    warmup: float = setting(500.0, "steps until the full rate; below 1: share of all steps")
    clip: float = setting(0.0, "longest gradient, as a norm; 0: off")
    adam_eps: float = setting(1e-6, "AdamW's epsilon")
    label_smoothing: float = setting(0.1, "on the answer's tokens", below=1)
    dropout: float = setting(0.0, "of the pretrained model; GLUE: the checkpoint's own", below=1)
    max_length: int = setting(512, "tokens, prompt and answer; longer answers are cut")
    lora_r: int = setting(4, "rank of the LoRA on q and v")
    lora_alpha: float = setting(32.0, "the LoRA's update is scaled by alpha / r")
    lora_dropout: float = setting(0.1, "on the LoRA's input", below=1)
    gate_lr: float = setting(0.1, "learning rate of the gate and a learned alpha")
    gate_weight_decay: float = setting(0.01, "of the gate")
    load_balance: float = setting(0.01, "coefficient of the load-balance loss")
    beams: int = setting(10, "beam size", below=4097)
    length_penalty: float = setting(0.9, "an answer scores log p / length ** this", below=100)
    no_repeat_ngram: int = setting(4, "so many tokens never twice; 0: off", least=0, below=4097)
    max_new_tokens: int = setting(64, "longest answer", below=4097)
    beam_rule: str = setting("transformers", "whose beam search", "transformers", "lora")
    precision: str | None = setting(None, "of matrix products; on CUDA bf16", "bf16", "float32")
    cuda_graphs: bool = setting(False, "a step in one launch; GPU only")
    eval_batch: int = setting(16, "sequences evaluated together")
    train_limit: int | None = setting(None, "train on only so many examples")
    dev_limit: int | None = setting(None, "score only so many examples of each dev set")
    test_limit: int | None = setting(None, "decode only so many MRs of the test set (E2E)")

    @property
    def name(self) -> str:
        """The run folder's name: <model>-<task>-<method>-s<seed>."""
        model = "-".join(Path(self.model).parts[-2:]).strip("/.") or Path(self.model).resolve().name
        parts = [model, self.task]
        if self.tune != "lora" or not self.molex:
            parts.append(self.tune)
        if self.molex:
            parts.append("molex")
        if self.init:
            parts.append("init")
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def method(self) -> str:
        """As tables call it."""
        tune = {"lora": "LoRA", "full": "full", "bitfit": "BitFit"}[self.tune]
        return f"{tune} + MoLEx" if self.molex else tune

    def warm_steps(self, steps: int) -> float:
        """In how many of so many steps the learning rate rises."""
        return self.warmup if self.warmup >= 1 else math.ceil(self.warmup * steps)

    def search(self) -> dict:
        """The settings of beam search."""
        return {name: getattr(self, name) for name in SEARCH}

    def as_json(self) -> dict:
        """As config.json has them: lists for tuples."""
        return json.loads(json.dumps(asdict(self)))


def paper_settings(shape: str, task: str) -> tuple[dict, str]:
    """What paper.toml sets for a model of that shape ("" for any other) on a task; and, if these
    are another model's settings or another task's, whose."""
    presets, columns = PAPER["presets"], PAPER["table5"]
    kind = task if task in ("e2e", "alpaca") else "glue"
    nano = presets["nano"].get(shape, {}).get(kind, {})
    if kind != "glue":
        own = nano or shape == "gpt2-medium" or task == "alpaca"  # Alpaca's are not the paper's
        return presets.get(task, {}) | nano, "" if own else "Table 6, for GPT-2 medium"
    found = {}
    for name, row in columns.get(shape, columns["roberta-base"]).items():
        if not isinstance(row, list):
            found[name] = row
        elif task in PAPER["tasks"]:
            found[name] = row[PAPER["tasks"].index(task)]
    found |= presets["glue"]
    if task not in PAPER["tasks"]:
        found |= presets["new_task"] | presets.get(task, {})
        return found | nano, "presets.new_task in support/paper.toml"
    own = nano or shape in columns
    return found | nano, "" if own else "Table 5, for RoBERTa-base"


# What evaluation heeds: the settings of beam search, and others.
SEARCH = ("beams", "length_penalty", "no_repeat_ngram", "max_new_tokens", "beam_rule")
OF_EVALUATION = ("eval_batch", "dev_limit", "test_limit", "precision", "data")

# --help has the settings in groups, by how their names begin; the others are of training.
GROUPS = {
    "the LoRA": ("lora_",),
    "MoLEx's training": ("gate_lr", "gate_weight_decay", "load_balance"),
    "decoding and evaluation": (
        "beam", "length_penalty", "no_repeat", "max_new", "eval_batch", "dev_limit", "test_limit"),
    "how it is run": ("precision", "cuda_graphs", "accumulate"),
}  # fmt: skip


def add_flag(group: Any, f: Field, value: object) -> None:
    """Add the flag of a setting to a parser or a group of one. What is not given is not in the
    result; the help says that `value` counts then."""
    number = float if float in kinds(f) else int if int in kinds(f) else str
    form = dict(type=number if f.default is None else type(f.default))
    flag = "--" + f.name.replace("_", "-")
    if f.metadata["choices"]:
        form = dict(choices=f.metadata["choices"])
    elif isinstance(f.default, bool):
        form = dict(action=argparse.BooleanOptionalAction)
    elif tuple in kinds(f):
        flag = "--molex-layers" if f.name == "layers" else flag
        form = dict(type=layer_range, metavar="0-11")
    if isinstance(value, tuple):
        value = f"{value[0]}-{value[-1]}"
    text = f.metadata["help"].replace("%", "%%") + ("" if value is None else f" ({value})")
    group.add_argument(flag, dest=f.name, default=argparse.SUPPRESS, help=text, **form)


def make_parser(tasks: list[str], gate: type, values: dict | None = None) -> Parser:
    """train.py's: a flag for every setting of a run and of the gate. `values`: those that --help
    shows; a field's default where they have none."""
    about = "Fine-tune with LoRA, with or without MoLEx. In brackets: what counts without a flag"
    parser = Parser(description=about, allow_abbrev=False, add_help=False)
    text = "this; with other flags beside it (--model, --task) what counts for them"
    parser.add_argument("-h", "--help", action="store_true", help=text)
    text = "hub name or folder (nano/'s, with --compare)"
    parser.add_argument("--model", type=plain_path, help=text)
    known = dict(choices=[*tasks, "glue"], type=lambda name: name.lower().replace("-", ""))
    parser.add_argument("--task", default="e2e", help="glue: all eight in turn (e2e)", **known)
    text = "folder of the official files; Alpaca: JSON file (hub)"
    parser.add_argument("--data", type=plain_path, help=text)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs go (runs)")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0], help="a run each (0)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-molex", action="store_true", help="LoRA (or --tune) alone")
    which.add_argument("--compare", action="store_true", help="that alone, then with MoLEx")
    text = "a finished run of the same model to start from, or a .bin file of the LoRA paper's code"
    text += "; with --compare one with MoLEx, one without; of glue for MRPC, RTE, STS-B (Table 9)"
    runs = dict(nargs="+", type=plain_path, default=[], metavar="RUN")
    parser.add_argument("--init-from", **runs, help=text)
    parser.add_argument("--fresh", action="store_true", help="start anew over an existing run")
    text = "not needed: the same command goes on with a run that was stopped"
    parser.add_argument("--resume", action="store_true", help=text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    groups = {name: parser.add_argument_group(name) for name in ("training", *GROUPS, "MoLEx")}
    values = values or {}
    for f in (f for f in fields(Settings) if f.metadata):
        of = [name for name, starts in GROUPS.items() if f.name.startswith(starts)]
        add_flag(groups[of[0] if of else "training"], f, values.get(f.name, f.default))
    for f in (f for f in fields(gate) if f.metadata):
        add_flag(groups["MoLEx"], f, values.get(f.name, f.default))
    return parser


def parse_command(
    gate: type, tasks: Iterable[str], argv: list[str] | None = None
) -> tuple[argparse.Namespace, list[Settings]]:
    """The command line, and the settings of every run it asks for, in order. `gate`: the dataclass
    of MoLEx's settings. Raises InputError if they do not fit each other."""
    args = make_parser(list(tasks), gate).parse_args(argv)
    if args.help:
        print_help(gate, tasks, args)
    runs = settle_all(args, gate)
    locate(args.out / runs[0].name)  # a name too long fails here, not in the middle
    if "dropout" not in vars(args) and any(s.task not in ("e2e", "alpaca") for s in runs):
        check_dropouts(checkpoint_folder(args.model) / "config.json")
    say_idle(args, runs, gate)
    return args, runs


def parse_eval(gate: type, tasks: Iterable[str]) -> argparse.Namespace:
    """eval.py's command line: train.py's flags, and its own. Raises InputError."""
    parser = make_parser(list(tasks), gate)
    parser.description = (
        "Evaluate a run, by its own settings, or a model, or score text with the E2E challenge's "
        "metrics. In brackets: what counts for a model without a flag"
    )
    parser.usage = "%(prog)s [RUN] [flags]"
    heeded = {*SEARCH, *OF_EVALUATION, "max_length", "device"}
    about = dict(help="this", model="as RUN", task="of a model before fine-tuning (e2e)")
    about.update(out="where its evaluation goes (runs)", seeds="of the head that it is given (0)")
    for action in parser._actions:  # train.py's other flags are known, so that a message names them
        if action.dest not in heeded:
            action.help = about.get(action.dest, argparse.SUPPRESS)
    own = parser.add_argument_group("evaluation")
    text = "a run, or a model before fine-tuning (nano/gpt2)"
    own.add_argument("run", nargs="?", type=plain_path, help=text)
    own.add_argument("--prompt", metavar="TEXT", help="only answer this")
    own.add_argument("--predictions", type=Path, help="one per line, or .csv/.tsv: MR, output")
    own.add_argument("--references", type=Path, help="groups of lines, or .csv/.tsv: mr, ref")
    own.add_argument("--json", action="store_true", help="also print the scores as JSON, last")
    args = parser.parse_args()
    if args.help:
        parser.print_help()
        raise SystemExit(0)
    outputs = [args.predictions, args.references]
    others = [args.run, args.device, args.prompt is not None, asked_for(args, gate)]
    if any(outputs) and (any(others) or not all(outputs)):
        raise InputError("give --predictions FILE and --references FILE, and nothing else")
    if args.prompt is not None and args.json:
        raise InputError("--json prints scores, of which a prompt has none")
    return args


def asked_for(args: argparse.Namespace, gate: type) -> set[str]:
    """Which of train.py's flags, but --device, are on the command line."""
    usual = dict(model=None, data=None, task="e2e", seeds=[0], out=Path("runs"), init_from=[])
    usual |= dict.fromkeys(("no_molex", "compare", "fresh", "resume"), False)
    asked = {name for name, value in usual.items() if getattr(args, name) != value}
    return asked | settings_given(args, gate)


def settings_given(args: argparse.Namespace, gate: type) -> set[str]:
    """The settings that are on the command line."""
    settings = {f.name for cls in (Settings, gate) for f in fields(cls) if f.metadata}
    return settings & vars(args).keys()  # they are there only if they were given


def refuse_unheeded(
    asked: set[str], args: argparse.Namespace, task: str, others: set[str], what: str
) -> None:
    """Raise InputError if a setting is among `asked` that is not heeded where a prompt is answered
    or, without one, where a run or a model is scored on that task. `what` can be done with those of
    evaluation and `others`."""
    heeded, why = {*OF_EVALUATION, *others}, f"changes nothing here; {what}"
    if task in ("e2e", "alpaca"):
        heeded |= {*SEARCH}
    heeded -= {"dev_limit" if task == "e2e" else "test_limit"}  # E2E alone has a test set here
    if args.prompt is not None:
        heeded, why = {*SEARCH, "precision"}, "changes nothing of an answer; a prompt can come"
    if idle := asked - heeded:
        known = ", ".join("--" + name.replace("_", "-") for name in sorted(heeded))
        raise InputError(f"--{min(idle).replace('_', '-')} {why} with {known}")


def refuse_prompt(args: argparse.Namespace, task: str) -> None:
    """Raise InputError if a classifier is to answer a prompt."""
    if args.prompt is not None and task not in ("e2e", "alpaca"):
        raise InputError("a classifier answers no --prompt; give a model or a run of e2e or alpaca")


def evaluated_again(
    folder: Path, args: argparse.Namespace | None, gate: type
) -> tuple[Settings, str]:
    """A run's settings with what a command line changes of decoding and data, and a name for the
    change ("": none). Raises InputError for a flag that cannot change any more."""
    s = read_settings(folder, gate)
    if args is None:
        return s, ""
    asked = asked_for(args, gate)
    if args.task == s.task:
        asked.discard("task")
    refuse_prompt(args, s.task)
    refuse_unheeded(asked, args, s.task, set(), "a run can be evaluated again")
    wanted = {name: getattr(args, name) for name in asked}
    changes = {name: value for name, value in wanted.items() if value != getattr(s, name)}
    again = replace(s, **changes)
    check_fields(again, "--")
    if "data" in changes:  # a path may be long, and another may end alike
        digest = hashlib.sha256(args.data.encode()).hexdigest()
        changes["data"] = f"{Path(args.data).name}-{digest[:8]}"
    parts = [f"{name}-{value}" for name, value in sorted(changes.items())]
    return again, re.sub(r"[^\w.]+", "-", "-".join(parts).replace("_", "-"))


def before_tuning(args: argparse.Namespace, gate: type) -> Settings:
    """The settings by which a model is evaluated as it is, after no epochs. Raises InputError."""
    if args.run and args.model:
        raise InputError(f"give one model, {args.run} or --model {args.model}")
    asked = asked_for(args, gate) - {"model", "task", "no_molex"}
    refuse_prompt(args, args.task)
    others = {"max_length", "out", "seeds"}
    refuse_unheeded(asked, args, args.task, others, "a model is evaluated as it is")
    args.model, args.no_molex, args.tune = args.run or args.model, True, "full"
    if not args.model:  # without arguments: a demonstration
        vars(args).setdefault("test_limit", 10)
    runs = settle_all(args, gate)
    if len(runs) > 1:
        raise InputError("give one --task and one of --seeds")
    return replace(runs[0], epochs=0)


def print_help(gate: type, tasks: Iterable[str], args: argparse.Namespace) -> None:
    """With the values that count for the other flags in `args`, and end the program."""
    values, note = {}, ""
    try:
        s = settle_all(args, gate)[-1]
        values = vars(s) | vars(s.molex or gate())
    except InputError as error:  # a model that is not to be had, say
        note = f"\nIn brackets are the defaults: {error}"
    make_parser(list(tasks), gate, values).print_help()
    print(note)
    raise SystemExit(0)


def settle_all(args: argparse.Namespace, gate: type) -> list[Settings]:
    """The settings of every run that the command line asks for, in order."""
    writes = args.task in ("e2e", "alpaca")
    compare = args.compare or (args.model is None and not args.no_molex)
    args.model = args.model or ("nano/gpt2" if writes else "nano/roberta")
    config = read_config(checkpoint_folder(args.model))
    if writes and not config["causal"]:
        what = f"{args.model} is an encoder, which cannot write text"
        raise InputError(f"{what}; try --model gpt2-medium")
    runs = []
    for task in PAPER["tasks"] if args.task == "glue" else [args.task]:
        starts = args.init_from if args.task != "glue" or task in FROM_MNLI else []
        kinds_of_run = [False, True] if compare else [not args.no_molex]  # without MoLEx, with it
        pair = [settle(args, gate, config, task, starts, mixes) for mixes in kinds_of_run]
        runs += [replace(s, seed=seed) for seed in dict.fromkeys(args.seeds) for s in pair]
    return runs


def say_idle(args: argparse.Namespace, runs: list[Settings], gate: type) -> None:
    """Print what was given on the command line and changes nothing, with the reason."""
    if args.resume:
        say("--resume is not needed: the same command goes on with a run that was stopped")
    if len(set(args.seeds)) < len(args.seeds):
        say("a seed is given twice: that is one run")
    gates = [s.molex for s in runs if s.molex]
    of_gate = {f.name for f in fields(gate)} | set(GROUPS["MoLEx's training"])
    writes = any(s.task in ("e2e", "alpaca") for s in runs)
    for name in vars(args):
        why = ""
        if name in of_gate and not gates:
            why = "it is MoLEx's"
        elif name == "proj_dim" and all(config.gate != "cosine" for config in gates):
            why = "only a cosine gate has a projection"
        elif name == "gate_weight" and all(config.top_k > 1 for config in gates):
            if args.gate_weight == "straight-through":
                why = "with K > 1 the task teaches the gate anyway"
        elif name.startswith("lora_") and all(s.tune != "lora" for s in runs):
            why = f"--tune {runs[0].tune} has no LoRA"
        elif name in runs[0].search() and not writes:
            why = "a classifier writes no text"
        elif name == "test_limit" and not writes:
            why = "GLUE is scored on its dev sets, see --dev-limit"
        if why:
            say(f"--{name.replace('_', '-')} has no effect here: {why}")


def settle(
    args: argparse.Namespace, gate: type, config: dict, task: str, starts: list[str], mixes: bool
) -> Settings:
    """The settings of one run, see the top of this file."""
    flags = {f.name: f.default for cls in (Settings, gate) for f in fields(cls) if f.metadata}
    given = {name: value for name, value in vars(args).items() if name in flags}
    init, inherited = source(starts, gate, args.model, mixes)
    tune = given.get("tune") or inherited.get("tune") or flags["tune"]
    size = [config["family"], config["n_layer"], config["d_model"]]
    shape = next((name for name, known in PAPER["models"].items() if known == size), "")
    # 1) What counts if nothing is given.
    base = flags | paper_settings(shape, task)[0]
    embedded_data = base.pop("data", None)  # the data beside the embedded models
    if task == "e2e":
        base["layers"] = tuple(range(min(12, config["n_layer"])))
    elif task != "alpaca":  # the checkpoint's own, as in the public LoRA scripts
        base["dropout"] = config["dropout"]
    base.update(PAPER["presets"].get(tune, {}))
    # 2) What is chosen, and where that differs.
    chosen = base | inherited | given
    of_gate = {f.name for f in fields(gate)}
    molex = gate(**{name: chosen[name] for name in of_gate})
    check_fields(molex, "--")
    molex.check(config["n_layer"])
    differs = {}
    for name, value in chosen.items():
        counts = name not in NOT_RESULTS and (mixes or name not in of_gate)
        if counts and value != base[name]:
            differs[name] = [value, base[name]]
    rest = {name: value for name, value in chosen.items() if name not in of_gate}
    rest.update(molex=molex if mixes else None, init=init, shape=shape, differs=differs)
    s = Settings(model=args.model, task=task, data=args.data or embedded_data, seed=0, **rest)
    check_fields(s, "--")
    return s


def read_settings(folder: Path, gate: type) -> Settings:
    """The settings of a run with a finished epoch. Raises InputError if it is none."""
    if not (folder / "adapter.safetensors").exists():
        raise InputError(f"{folder} is not a run with a finished epoch")
    where = folder / "config.json"
    return from_json(Settings, read_json(where), where, molex=gate)


def source(paths: list[str], gate: type, model: str, mixes: bool) -> tuple[str | None, dict]:
    """Which of --init-from's paths a run with or without MoLEx starts from, and the settings that
    come with it. A run with MoLEx may start from one without if there is no other."""
    found = {}  # with MoLEx or without -> path, settings
    for path in paths:
        s = None if Path(path).is_file() else read_settings(Path(path), gate)
        if s and s.model != model:
            raise InputError(f"--init-from {path} is a run of {s.model}, not of {model}")
        kind = bool(s and s.molex)
        if kind in found:
            how = "with" if kind else "without"
            raise InputError(f"--init-from {path} is a second run {how} MoLEx; give one of each")
        found[kind] = (path, s)
    if not found:
        return None, {}
    if mixes not in found and False not in found:
        raise InputError(f"--init-from {paths[0]} has MoLEx; give a run without it as well")
    path, s = found.get(mixes) or found[False]
    return path, dict(tune=s.tune, lora_r=s.lora_r, lora_alpha=s.lora_alpha) if s else {}
