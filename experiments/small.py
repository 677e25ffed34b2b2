"""What the scripts that look at finished runs share: RUN on the command line, or the small form."""

from argparse import Namespace
from pathlib import Path

import train
from support.cli import Parser, pick_device


def runs_parser(about: str, runs: str, out: str, draws: bool = False) -> Parser:
    """RUN, of which the help says `runs`; --out, by default `out`; --device. `draws`: --out is for
    a picture, too."""
    parser = Parser(description=about)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help=runs)
    picture = "the picture goes and, " if draws else ""
    what = f"where {picture}without RUN, what is trained (%(default)s)"
    parser.add_argument("--out", type=Path, default=Path(out), help=what)
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    return parser


def finished_runs(args: Namespace, *small: str) -> list[Path]:
    """The folders given or, without any, those of the small form, which are trained here or kept:
    `small` are command lines of train.py."""
    if args.runs:
        return args.runs
    settings = [s for flags in small for s in train.parse(flags.split())[1]]
    return [train.run(s, args.out, False, pick_device(args.device)) for s in settings]
