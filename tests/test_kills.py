"""Runs that are killed, by real signals at random moments, end like runs that are not.

Every test starts runs of a few steps in processes of their own and ends four of them by SIGKILL,
SIGTERM or SIGINT: at any time from the first line of main on, or at the moment of a rename. The
same command then goes on, and what it leaves in the end has to equal what an uninterrupted run
leaves, to the bit but for times. `pytest tests/test_kills.py --kills 100 -s` is the long form; it
prints what was hit.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import train
from support.cli import command_line

ROOT = Path(__file__).parents[1]
FLAGS = {  # 5 steps in two epochs; 6 steps in three
    "mrpc": "--model nano/roberta --max-steps 5 --epochs 4 --eval-batch 8 --learn-alpha",
    "e2e": "--model nano/gpt2 --epochs 3 --test-limit 2 --beams 2 --max-new-tokens 4",
}
LINES = {"MRPC/train.tsv": 41, "MRPC/dev.tsv": 17, "trainset.csv": 17, "devset.csv": 9,
         "testset_w_refs.csv": 9}  # fmt: skip
EXIT = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
TIMES = ("seconds", "seconds_per_step", "date")


def pytest_generate_tests(metafunc):
    kills = metafunc.config.getoption("--kills")
    metafunc.parametrize("seed", range(-(-kills // 4)))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[..., multiprocessing.Process]:
    """start(task, home, save_seconds, aim): train.py on a few lines of its data, with `home` as the
    working directory; returns once it has begun. Forked from a process that has imported torch."""
    data = tmp_path_factory.mktemp("data")
    (data / "MRPC").mkdir()
    for name, count in LINES.items():
        source = ROOT / "nano" / ("glue" if "/" in name else "e2e") / name
        (data / name).write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "matplotlib.figure", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(ROOT))
        m.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()

    def begin(task: str, home: Path, *rest) -> multiprocessing.Process:
        begun = home / "begun"
        begun.unlink(missing_ok=True)
        argv = f"train.py --task {task} --data {data} {FLAGS[task]}".split()
        process = context.Process(target=run, args=(argv, home, *rest))
        process.start()
        while not begun.exists():
            assert process.exitcode is None
            time.sleep(0.005)
        return process

    return begin


def meteor(predictions: list[str], references: list[list[str]]) -> float:
    """In the place of METEOR, whose Java takes longer than all the rest of a run."""
    return 0.5


def run(argv: list[str], home: Path, save_seconds: float, aim: tuple | None) -> None:
    """In its own process: train.py's main. aim: (signal, n, before): kill it at its n-th rename,
    right before it or right after."""
    home.mkdir(exist_ok=True)
    os.chdir(home)
    log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if started in the background
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill leaves behind
    train.SAVE_SECONDS, sys.argv = save_seconds, argv
    replace, renames = os.replace, []

    def aimed(source, target):
        renames.append(target)
        hit = aim is not None and len(renames) == aim[1]
        if hit and aim[2]:
            os.kill(os.getpid(), aim[0])
        replace(source, target)
        if hit and not aim[2]:
            os.kill(os.getpid(), aim[0])

    os.replace, evaluation.meteor = aimed, meteor

    def main() -> None:
        Path("begun").touch()
        train.main()

    command_line(main)


def plain(x):
    """The same without times, and with tensors as their bytes."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items() if k not in TIMES}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, Tensor) else x


def content(folder: Path) -> dict:
    """File name -> what it holds but for times."""
    found = {}
    for file in folder.iterdir():
        found[file.name] = file.read_bytes()
        if file.suffix == ".pt":
            found[file.name] = plain(torch.load(file, weights_only=True))
        if file.suffix in (".json", ".jsonl"):
            text = file.read_text()
            parts = text.splitlines() if file.suffix == ".jsonl" else [text]
            found[file.name] = [plain(json.loads(part)) for part in parts]
    return found


def stage(home: Path) -> str:
    """How far a killed run has come."""
    (folder,) = [f for f in home.glob("runs/*") if not f.name.startswith(".")] or [home / "none"]
    if not (folder / "last.pt").exists():
        return "before a state was saved"
    state = torch.load(folder / "last.pt", weights_only=True)
    steps = 5 if "mrpc" in folder.name else 6
    done = state["progress"]["log"] and state["progress"]["log"][-1]["step"] == steps
    return "in evaluation" if done else "in training"


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> dict:
    """Task -> what an uninterrupted run leaves, its seconds, and the number of its renames."""
    found = {}
    for task in FLAGS:
        home = tmp_path_factory.mktemp(task)
        process, begun = start(task, home, 0, None), time.perf_counter()
        process.join()
        assert process.exitcode == 0, (home / "log").read_text()
        (folder,) = (home / "runs").iterdir()
        found[task] = content(folder), time.perf_counter() - begun
    return found


@pytest.fixture(scope="module")
def counts():
    found = Counter()
    yield found
    for what, count in sorted(found.items()):
        print(f"{count:5}  {what}")


def test_a_killed_run_ends_like_one_that_was_not(start, whole, counts, tmp_path, seed):
    rng, kills, runs, finished = random.Random(seed), 0, 0, False
    task = ("mrpc", "e2e")[seed % 2]
    expected, seconds = whole[task]
    while kills < 4 or not finished:
        home, number, aim = tmp_path / str(runs), rng.choice([*EXIT]), None
        number = signal.SIGKILL if rng.random() < 0.3 else number
        if kills < 4 and rng.random() < 0.5:
            aim = (number, rng.randint(1, 12), rng.random() < 0.5)
        process = start(task, home, rng.choice([0, 60]), aim)
        if kills < 4 and aim is None:
            process.join(rng.uniform(0, seconds))
            if process.exitcode is None:
                os.kill(process.pid, number)
        process.join(120)
        log = (home / "log").read_text()
        assert process.exitcode in (0, EXIT[number]), log
        finished = process.exitcode == 0
        if not finished:
            kills += 1
            assert number == signal.SIGKILL or log.count("\ninterrupted") == 1
            assert "Traceback" not in log and "rror" not in log
            counts[f"{number.name} {'at a rename' if aim else 'at any time'} {stage(home)}"] += 1
        else:
            runs += 1
            (folder,) = (home / "runs").iterdir()  # and no lock
            found = content(folder)
            assert found.keys() == expected.keys()
            assert [n for n in found if found[n] != expected[n]] == []
            shutil.rmtree(home)
