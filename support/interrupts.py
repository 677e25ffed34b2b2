"""Ctrl-C while a script's modules load, which takes seconds: one line, and the exit code is 130.

Imported first by the scripts that run for long. From `cli.command_line` on, that decides.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def end(number: int, frame: FrameType | None) -> None:
    """Nothing has begun that has to be put in order."""
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)


# Only for a script of this folder: who imports one has handlers of their own.
script = Path(sys.argv[0]).resolve()
if script.is_file() and script.parent == Path(__file__).resolve().parents[1]:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
