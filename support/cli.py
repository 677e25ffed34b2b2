"""The command line: its parser, the device, and how a command ends."""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from support.files import InputError, reason


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; by default CUDA, if there is one. Raises InputError."""
    try:
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        return device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name} cannot be used here: {reason(error)}") from error


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies matrices in bfloat16; where Linux does not say, it may."""
    words = cpuinfo.read_text("utf-8").split() if cpuinfo.exists() else ["bf16"]
    return not {"bf16", "avx512_bf16", "amx_bf16"}.isdisjoint(words)


def progress_bar(*args: object, **more: object) -> tqdm:
    """A progress bar, silent where stderr is no terminal."""
    return tqdm(*args, **{"disable": None, **more})


def command_line(main: Callable[[], None], resumes: str = "") -> None:
    """Run main; an InputError becomes one line on stderr and exit code 2. SIGTERM ends it like
    Ctrl-C, in order, with one line, which says how it `resumes`; the exit code is then 143, or 130.
    What comes after the first signal changes nothing more."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, *([signal.SIGINT] if before != signal.SIG_IGN else [])):
        signal.signal(number, stop)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever read our output, `head` say, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        raise  # another pipe's
    except KeyboardInterrupt as stopped:
        end_interrupted(resumes, (stopped.args or [signal.SIGINT])[0])


def end_interrupted(resumes: str, number: int) -> None:
    """End the program, which a signal has stopped."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    print(f"\ninterrupted{resumes and '; '}{resumes}", file=sys.stderr)
    sys.exit(128 + number)


class Parser(argparse.ArgumentParser):
    """Reports what is wrong like every other input error, in one line."""

    def error(self, message: str) -> None:
        unknown = re.search("unrecognized arguments: (-[^ =]+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
        raise InputError(message + (f"; is {near[0]} meant?" if near else ""))


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument: a whole number from `low` to 2^31 - 1 (torch may overflow above)."""

    def integer(text: str) -> int:
        number, high = int(text), 2**31 - 1
        if low <= number <= high:
            return number
        beyond = f"less than {low}" if number < low else f"more than {high}"
        raise argparse.ArgumentTypeError(f"{text} is {beyond}")

    return integer


def plain_path(text: str) -> str:
    """The type of an argument that names a folder, a file or a model of the hub: "./a/" is "a"."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return str(Path(text))


def layer_range(text: str) -> tuple[int, ...]:
    """The type of an argument such as "0-11" -> (0, 1, ..., 11)."""
    ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    slots = ends and tuple(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    if not slots:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of layers; write it as 0-11")
    return slots
