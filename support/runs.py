"""A run's folder, and how a run goes on after it was stopped.

    config.json           its settings
    origin.json           what it was made of: hashes of what was read, versions, command, date
    last.pt               the state to go on from, saved every minute, after an epoch, on Ctrl-C
    metrics.jsonl         a line for each epoch
    adapter.safetensors   what is trained, of the best epoch
    predictions.tsv, references.txt, samples.txt, loss.png, routes.json, routes.png, scores.json

The first two are there from the start, last.pt once it is saved, the next two after an epoch, the
rest when the run is evaluated, scores.json last. Every file is replaced whole or not at all, so a
kill loses a minute and no more. A run goes on only with the settings and the files that it began
with. An unfinished run can be evaluated, too: that goes to the folder `unfinished` within it.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support import files
from support.adapters import GATE
from support.checkpoints import COUNT, checkpoint_files, checkpoint_folder, is_checkpoints
from support.files import NUMBER, InputError
from support.pictures import GATE_LINES, plot_curves, plot_routes
from support.processes import is_first
from support.settings import Settings, from_json

SAVE_SECONDS = 60  # within an epoch; its end is saved anyway


def is_run(folder: Path) -> bool:
    return (folder / "adapter.safetensors").exists() or (folder / "last.pt").exists()


REPLACE = "take another --out, or remove it (train.py: --fresh)"
PUT_BACK = "put back what was there, or train anew with train.py --fresh"


class RunFolder:
    """One run on disk. `metric` finds its best epoch: the lowest dev_loss, or the highest other."""

    def __init__(self, path: Path, metric: str = "dev_loss") -> None:
        self.path, self.metric = path, metric

    # --- how it begins, and goes on

    def finished(self, s: Settings, data: Iterable[Path]) -> bool:
        """Whether the run is there to its end. Raises InputError if it is one of other settings, or
        was made of other files."""
        where = self.path / "config.json"
        if not where.exists():
            return False
        if changed := other_settings(files.read_json(where), s, where):
            what = f"{self.path} holds a run with another {', '.join(changed)}"
            raise InputError(f"{what}; {REPLACE}")
        if not (self.path / "scores.json").exists():
            return False
        self.check_files(s, data, REPLACE)
        then = files.read_json(self.path / "origin.json").get("init")  # an older run has none
        if then not in (None, init_hash(s)):
            raise InputError(f"{self.path} started from {s.init}, which has changed; {REPLACE}")
        with suppress(InputError), files.locked(self.path):
            pass  # so goes the lock's file that a kill at the very end has left
        return True

    def check_files(self, s: Settings, data: Iterable[Path], advice: str) -> None:
        """Raise InputError unless the files that the run was made of are as they were; without
        `data`, those of its checkpoint."""
        where = self.path / "origin.json"
        then, now = files.read_json(where, {"files": (dict,)}), hashes(s, data)
        known = {n: h for n, h in then["files"].items() if data or is_checkpoints(n)}
        if changed := other_files(known, now, s):
            what = f"{self.path} was made of another {', '.join(changed)}"
            if then.get("checkpoint") != str(checkpoint_folder(s.model).resolve()):
                what += f" (the checkpoint was {then.get('checkpoint', 'not noted')})"
            raise InputError(f"{what}; {advice}")

    def remove(self) -> None:
        """At once: a kill leaves the whole run or none of it."""
        removed = self.path.with_name(f".{self.path.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)  # where a kill has left one
        self.path.rename(removed)
        self.path.mkdir()
        shutil.rmtree(removed)

    def save(self, state: dict, device: torch.device) -> None:
        """`state`: name -> what has a state_dict, or tensors by name, or other values by name."""
        saved = {"origin": self.origin, "rng": torch.get_rng_state()}
        if device.type == "cuda":
            saved["cuda_rng"] = torch.cuda.get_rng_state(device)
        for name, part in state.items():
            saved[name] = part.state_dict() if hasattr(part, "state_dict") else part
        files.write_atomic(self.path / "last.pt", lambda path: torch.save(saved, path))

    def start(self, s: Settings, data: Iterable[Path], state: dict, model: Any) -> None:
        """Put back what `save` has saved or, if there is nothing, write what a new run begins with.
        `model`: a Transformer. Raises InputError if what is there is of another run, or if the gate
        has parts that a run, which keeps what is trained, would not."""
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for name in model.state_dict().keys() - trained:
            if name.startswith(GATE):
                what = f"{name} is not trained, so a run does not keep it"
                raise InputError(f"{what}; make it a constant, a buffer with persistent=False")
        self.origin = now = origin(s, data, type(model.layers).__name__)
        last, config = self.path / "last.pt", self.path / "config.json"
        if not last.exists():
            if is_first():
                files.write_json(self.path / "origin.json", now)
                files.write_json(config, now["settings"])
            return
        # 1) Is it this run?
        saved = files.read_tensors(last, dict.fromkeys((*state, "origin"), (dict,)))
        parts = dict.fromkeys(("settings", "files", "versions"), (dict,))
        self.origin = then = files.check(saved["origin"], parts, last)
        other = other_settings(then["settings"], s, last)
        other += other_files(then["files"], now["files"], s)
        if then.get("layers", now["layers"]) != now["layers"]:  # an older run has none
            other.append(f"class of layers ({then['layers']})")
        if other or not config.exists():
            what = f"{last} is of a run with another {', '.join(other or ['folder'])}"
            raise InputError(f"{what}; put that back or use --fresh")
        # 2) The state.
        for name, part in state.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(saved[name])
            elif all(isinstance(value, Tensor) for value in part.values()):
                files.fill(part, saved[name], last)
            else:
                part.update(saved[name])
        if not is_first():  # the other processes go on with dropout of their own
            return
        for name in differences(then["versions"], now["versions"]):
            was, new = then["versions"][name], now["versions"][name]
            print(f"{self.path}: {name} was {was}, is now {new}")
        torch.set_rng_state(saved["rng"])
        if model.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"], model.device)

    # --- the log, and the best epoch

    def write_log(self, log: list[dict], tensors: dict[str, Tensor]) -> None:
        """After an epoch: keep its weights if it is the best, and note it."""
        if self.best_of(log) is log[-1]:
            best = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
            file = self.path / "adapter.safetensors"
            files.write_atomic(file, lambda path: save_file(best, path))
        lines = [json.dumps(entry) + "\n" for entry in log]
        files.write_text(self.path / "metrics.jsonl", "".join(lines))

    def read_log(self) -> list[dict]:
        """The entries of metrics.jsonl. Raises InputError."""
        where = self.path / "metrics.jsonl"
        log = files.parse_json(files.read_text(where), where, lines=True)
        for entry in log:
            files.check(entry, {self.metric: NUMBER, "step": COUNT, "curve": (list,)}, where)
            for point in entry["curve"]:
                files.check(point, {"step": COUNT, "loss_sum": NUMBER}, where)
                if "alpha" in point:
                    names = [n for n in GATE_LINES if n != "changed" or n in point]  # see RouteLog
                    files.check(point, dict.fromkeys([*names, "balance"], NUMBER), where)
        return log

    def best_of(self, log: list[dict]) -> dict:
        """The epoch whose dev set fared best, the first of equals."""
        if self.metric == "dev_loss":
            return min(log, key=lambda entry: entry["dev_loss"])
        return max(log, key=lambda entry: entry[self.metric])

    def reads_other_data(self, s: Settings) -> bool:
        """Whether `s`, by which the run is evaluated, names other data than it was trained on."""
        return files.read_json(self.path / "config.json").get("data") != s.data

    def scores_of(self, log: list[dict], s: Settings, again: str) -> dict:
        """What the best epoch's entry has for scores.json. Another evaluation (`again`) has not the
        examples of training, one on other data not the dev loss of the run's own."""
        left_out = {"curve", "examples"} if again else {"curve"}
        if self.reads_other_data(s):
            left_out.add("dev_loss")
        entry = self.best_of(log)
        return {name: value for name, value in entry.items() if name not in left_out}

    def best(self, s: Settings, layers: str = "") -> dict[str, Tensor]:
        """What the best epoch has trained. `layers`: the class of the model's stack, where it is a
        fork's. Raises InputError, also if the run was made of another checkpoint, or with another
        class, in which the same weights would compute something else."""
        self.check_files(s, (), PUT_BACK)
        ours = layers or ("MoLEx" if s.molex else "Layers")
        theirs = files.read_json(self.path / "origin.json").get("layers", ours)  # an older has none
        if theirs != ours:
            what = f"{self.path} is a run of {theirs}, not of {ours}"
            raise InputError(f"{what}; the script that trained it evaluates it")
        return files.read_tensors(self.path / "adapter.safetensors")

    # --- what evaluation finds

    @contextmanager
    def evaluating(
        self, s: Settings, data: Callable[[], Iterable[Path]], again: str = ""
    ) -> Iterator["RunFolder"]:
        """Where the evaluation goes: this folder, or one within it if the run is unfinished, or is
        evaluated `again` with other settings. Raises InputError if the run was made of another
        checkpoint or, unless other data is asked for, if `data()` has changed."""
        self.check_files(s, () if self.reads_other_data(s) else data(), PUT_BACK)
        log, out = self.read_log(), self
        steps = s.epochs * log[0]["step"]
        if s.max_steps:
            steps = min(steps, s.max_steps)
        if log[-1]["step"] < steps:
            out = RunFolder(self.path / "unfinished", self.metric)
            print(f"{self.path} is unfinished, {log[-1]['step']} of {steps} steps; see {out.path}")
        if again:
            out = RunFolder(out.path / again, self.metric)
            print(f"with other settings than the run's; see {out.path}")
        with files.locked(out.path):
            yield out

    def write_table(self, header: list[str], rows: Iterable[tuple]) -> None:
        """predictions.tsv, a line for each row."""
        lines = ["\t".join(map(str, row)) + "\n" for row in (header, *rows)]
        files.write_text(self.path / "predictions.tsv", "".join(lines))

    def write_answers(self, rows: dict, answers: dict, names: tuple[str, ...]) -> None:
        """predictions.tsv and samples of a classifier, in the task's own words. Of each split its
        rows (texts, label) and answers; `names` of the classes, none for a score."""
        lines, samples = [], []
        for split, read in rows.items():
            for i, (texts, label) in enumerate(read):
                both = (label, answers[split][i])
                right, said = (names[int(y)] if names else f"{y:.3f}" for y in both)
                lines.append((split, i, right, said))
                samples.append(("\n".join(texts), said, right))
        self.write_table(["split", "index", "label", "prediction"], lines)
        self.write_samples(samples)

    def write_references(self, groups: list[list[str]]) -> None:
        """As the E2E challenge has them: one a line, an empty line between groups."""
        blocks = ["".join(" ".join(text.split()) + "\n" for text in group) for group in groups]
        files.write_text(self.path / "references.txt", "\n".join(blocks))

    def write_samples(self, items: Iterable[tuple[str, str, str]]) -> None:
        """At most five of these texts, each with the output and what is right."""
        items = list(items)
        chosen = items[:: max(1, len(items) // 5)][:5]
        parts = [f"{text}\n  output:    {o}\n  reference: {r}\n" for text, o, r in chosen]
        files.write_text(self.path / "samples.txt", "\n".join(parts))

    def print_samples(self) -> None:
        try:
            samples = (self.path / "samples.txt").read_text("utf-8")  # none is no error
        except (OSError, ValueError) as error:
            samples = f"  (samples.txt cannot be read: {files.reason(error)})\n"
        print(f"\n{self.path.name} says:\n\n{samples}")

    def write_scores(self, scores: dict, log: list[dict], shares: Tensor | None) -> None:
        """The pictures, and at last the scores, by which a run is finished."""
        name = self.path.parent.name if self.path.name == "unfinished" else self.path.name
        if shares is not None:
            files.write_json(self.path / "routes.json", shares.tolist(), indent=None)
            plot_routes({name: shares}, self.path / "routes.png")
        plot_curves([(name, log)], self.metric, self.path / "loss.png")
        files.write_json(self.path / "scores.json", scores)

    def read_scores(self, names: Iterable[str]) -> dict[str, float]:
        """scores.json, which must have these and what every run has. Raises InputError."""
        forms = dict.fromkeys((*names, "trainable", "seconds_per_step"), NUMBER)
        return files.read_json(self.path / "scores.json", forms)

    def outputs(self) -> tuple[list[str], list[list[str]]]:
        """E2E's outputs and their references. Raises InputError."""
        where = self.path / "predictions.tsv"
        outputs = [line.rpartition("\t")[2] for line in files.read_text(where).split("\n")[1:-1]]
        if not (self.path / "references.txt").exists():  # of an older run
            raise InputError(f"{self.path} has no references.txt: python eval.py {self.path}")
        groups = files.read_text(self.path / "references.txt").rstrip("\n").split("\n\n")
        if len(groups) != len(outputs):
            raise InputError(f"{where} has {len(outputs)} outputs, not {len(groups)}")
        return outputs, [group.split("\n") for group in groups]


def drop_other_gate(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Of two runs' tensors the gates and alphas go unless the gates have the same shapes; the alpha
    alone goes if only one of the two has learned it. Returns how to say it."""
    gates, alphas = (
        [{n: x.shape for n, x in d.items() if n.startswith(start)} for d in (ours, theirs)]
        for start in GATE
    )
    if gates[0] != gates[1]:
        gone, said = GATE, " and its gate, for want of one of this shape"
        said = said if gates[1] else "; it has no gate"
    elif alphas[0] != alphas[1]:
        gone, said = GATE[1:], " and alpha, which only one of the two learns"
    else:
        return ""
    for tensors in (ours, theirs):
        for name in [name for name in tensors if name.startswith(gone)]:
            del tensors[name]
    return said


def differences(then: dict, now: dict) -> list[str]:
    """The names that have another value."""
    return [name for name in then | now if then.get(name) != now.get(name)]


def other_files(then: dict, now: dict, s: Settings) -> list[str]:
    """The files that have another hash. What is of a checkpoint and not read, which older runs have
    noted, too, only has to be there."""
    folder = checkpoint_folder(s.model)
    unread = {n for n in then.keys() - now if is_checkpoints(n) and (folder / n).exists()}
    return [name for name in differences(then, now) if name not in unread]


def other_settings(then: dict, s: Settings, where: object) -> list[str]:
    """In which settings a run differs from `s`. What its file lacks is as by default; "differs"
    follows from the others."""
    nested = {"molex": type(s.molex)} if s.molex else {}
    old = from_json(Settings, then, where, **nested)
    one, other = old.as_json(), s.as_json()
    if one["molex"] and other["molex"]:  # then by their own names
        one, other = ({**x, **x["molex"], "molex": None} for x in (one, other))
    return [name for name in differences(one, other) if name != "differs"]


@cache
def sha256(path: Path, size: int, changed: int) -> str:
    """Of a file of that size that was last changed at that time, so that it is read once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256. Raises InputError if the file cannot be read."""
    try:
        stat = path.stat()
        return sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def hashes(s: Settings, data: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of the files that a run reads, by name, in a checkpoint by the path within it; not of
    what comes from the hub's data sets. Raises InputError if one cannot be read."""
    folder = checkpoint_folder(s.model)
    named = {os.path.relpath(path, folder): path for path in checkpoint_files(folder)}
    named |= {path.name: path for path in data}
    return {name: file_hash(path) for name, path in named.items()}


def init_hash(s: Settings) -> str | None:
    """SHA-256 of what a run starts from, see --init-from."""
    if not s.init:
        return None
    path = Path(s.init)
    return file_hash(path / "adapter.safetensors" if path.is_dir() else path)


def origin(s: Settings, data: Iterable[Path], layers: str) -> dict:
    """What a run is made of: settings, the hashes of its files and of what it starts from, where
    its checkpoint was, the class of its layers, versions, command and date."""
    made_of = dict(settings=s.as_json(), files=hashes(s, data), init=init_hash(s), layers=layers)
    made_of["checkpoint"] = str(checkpoint_folder(s.model).resolve())
    versions = dict(python=platform.python_version(), torch=str(torch.__version__), commit=commit())
    command, date = shlex.join(sys.argv), datetime.now().astimezone().isoformat(timespec="seconds")
    return made_of | dict(versions=versions, command=command, date=date)


def commit() -> str | None:
    """Of this project's repository, if it is one."""
    home = Path(__file__).parents[1]
    if not (home / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", home, "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
