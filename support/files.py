"""A user's files, and errors in one line.

What is read is checked against what is expected. What is written replaces the old file whole or not
at all. Whatever a user can put right is an InputError, which `cli.command_line` prints in one line.
"""

import csv
import json
import os
import pickle
import re
import reprlib
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import portalocker
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class InputError(ValueError):
    """Something the user can put right; the command line prints it in one line and exits with 2."""

    def __init__(self, message: str) -> None:  # what it quotes of a file may be anything
        super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", message)[:900])


def reason(error: Exception) -> str:
    """The first line of an error's message, or what kind it is if it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises InputError if it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def parse_json(text: str, where: object, lines: bool = False) -> object:
    """The value in a JSON text from `where`, or a list of those on its lines. Raises InputError."""
    if lines:
        parts = enumerate(text.split("\n"), start=1)
        return [parse_json(part, f"{where}, line {n}") for n, part in parts if part.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise InputError(f"{where} is not JSON: {reason(error)}") from None


def check(values: object, forms: dict[str, tuple], where: object) -> dict:
    """`values`, if it is a dictionary that has each name of `forms` in its form: a type, then for
    numbers the lowest and the highest, then None if it may be null. Raises InputError."""
    if not isinstance(values, dict):
        raise InputError(f"{where} holds {reprlib.repr(values)}, not names with values")
    for name, (kind, *limits) in forms.items():
        if name not in values:
            raise InputError(f"{where} lacks {name}")
        value, number = values[name], kind in (int, float)
        fits = isinstance(value, int | float if kind is float else kind)
        if number and fits:
            fits = not isinstance(value, bool) and limits[0] <= value <= limits[1]
        if not fits and not (value is None and None in limits):
            words = f"{kind.__name__} from {limits[0]} to {limits[1]}" if number else kind.__name__
            raise InputError(f"{where}: {name} is {reprlib.repr(value)}, not {words}")
    return values


NUMBER = (float, -1e30, 1e30)


def read_json(path: Path, forms: dict[str, tuple] | None = None) -> dict:
    """The dictionary in a JSON file, see `check`. Raises InputError."""
    return check(parse_json(read_text(path), path), forms or {}, path)


def read_tensors(path: Path, forms: dict[str, tuple] | None = None) -> dict:
    """The tensors of a .safetensors file, or of one by torch.save: by name, nothing else, unless
    `forms` say what it has (see `check`). Nothing in it can run. Raises InputError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{part} in it is not what was written")  # torch would not notice
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not forms and {(type(n), w.layout) for n, w in found.items()} - {(str, torch.strided)}:
            raise ValueError("it does not hold tensors by name")
    except pickle.UnpicklingError:
        raise InputError(f"{path} cannot be read: it is damaged, or holds code") from None
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} cannot be read: {reason(error)}") from None
    return check(found, forms or {}, path)


def check_tensors(have: dict[str, Tensor], wanted: dict[str, Tensor], where: object) -> None:
    """Raise InputError, naming tensors, unless `have` has the names and shapes of `wanted` and its
    values are floating-point numbers (or of the type wanted), none of them NaN or infinite."""
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    both = [(n, w, wanted[n].shape) for n, w in have.items() if n in wanted]
    plain = [(n, w) for n, w, _ in both if w.dtype in (*floats, wanted[n].dtype)]
    for what, names in {
        "lacks": wanted.keys() - have.keys(),
        "has unknown": have.keys() - wanted.keys(),
        "has misshapen": {f"{n} {(*w.shape,)}, not {(*x,)}" for n, w, x in both if w.shape != x},
        "has quantized": {n for n, _, _ in both} - {n for n, _ in plain},
        "has NaN or infinite values in": {n for n, w in plain if not w.isfinite().all()},
    }.items():
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{where} {what} {len(names)} tensor(s): {first}")


def read_lines(path: Path) -> list[str]:
    """Its lines, stripped."""
    return [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]


def read_rows(path: Path) -> list[str]:
    """A table's lines as they are: a value at either end may be empty, or hold white space."""
    return read_text(path).rstrip("\n").split("\n")


csv.field_size_limit(2**31 - 1)  # or csv itself fails at a quotation mark that nothing closes


def read_table(
    path: Path, columns: list[str], delimiter: str = ",", header: tuple = (), ragged: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table, each as ("FILE, line N", {column: value}). With commas a value may be
    quoted; otherwise a quotation mark is text. header: the columns, if the file does not name them.
    ragged: rows with too few values, or too many, are left out, which is said. Raises InputError
    if one of `columns` or a value is missing, or if there are no rows."""
    if delimiter == ",":
        reader = csv.reader(line + "\n" for line in read_rows(path))
        rows = ((reader.line_num, row) for row in reader if row)  # a row may go over several lines
    else:
        rows = enumerate((line.split(delimiter) for line in read_rows(path)), start=1)
    names = header or [name.strip() for name in next(rows)[1]]
    if absent := set(columns) - set(names):
        raise InputError(f"{path} has no column {' and no column '.join(sorted(absent))}")
    if doubled := [name for name in columns if list(names).count(name) > 1]:
        raise InputError(f"{path} has two columns {doubled[0]}")
    count = broken = 0
    for number, row in rows:
        where = f"{path}, line {number}"
        if len(row) > len(names) and delimiter != "\t":
            raise InputError(f"{where}: more values than columns; quote values that hold a comma")
        if len(row) != len(names):
            if not ragged:
                raise InputError(f"{where}: {len(row)} columns, not {len(names)}")
            broken += 1
            continue
        count += 1
        yield where, dict(zip(names, row, strict=False))
    if broken:
        print(f"{path}: left out {broken} rows with too few columns, or too many")
    if not count:
        raise InputError(f"{path} holds no examples")


def from_hub(what: str, data: str, *args: str, **kwargs: str):
    """`datasets.load_dataset`; an InputError says what is not to be had, and what --data takes."""
    from datasets import load_dataset  # slow to import

    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # offline, moved, ...: many kinds, one thing to tell the user
        way = f"get the official files by other means and pass --data {data}"
        raise InputError(f"{what} cannot be fetched ({reason(error)}); {way}") from error


@torch.no_grad()
def fill(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: object) -> None:
    """Copy their tensors into ours, in place. Raises InputError if they do not fit."""
    check_tensors(theirs, ours, where)
    for name, p in ours.items():
        p.copy_(theirs[name])


def locate(path: str | Path) -> Path:
    """The path as given or, if nothing is there, beside the six scripts ("nano/gpt2")."""
    beside = Path(__file__).parents[1] / path
    try:
        return beside if beside.exists() and not Path(path).exists() else Path(path)
    except OSError as error:
        raise InputError(f"{path} is not a path: {error.strerror}") from None


@contextmanager
def signals_wait(active: bool = True) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait until the end of the block, where they count; inside it, the list
    says whether one has come. A second one ends the block at once. Not active: nothing changes."""
    come = []

    def note(number: int, _: object) -> None:
        if come:
            raise KeyboardInterrupt(number)
        come.append(number)

    signals = (signal.SIGINT, signal.SIGTERM) if active else ()
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in come:
        signal.raise_signal(number)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a run folder, which ends with its process at the latest. The folder is made,
    and goes if nothing has come into it. Raises InputError without a lock."""
    path = folder.resolve()
    file = path.with_name(f".{path.name}.lock")  # beside the folder, which --fresh replaces
    lock = portalocker.TemporaryFileLock(file, timeout=0)
    try:
        new = [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
        print(os.getpid(), file=lock.acquire(), flush=True)
    except portalocker.AlreadyLocked:
        holder = "another process"
        with suppress(OSError, ValueError):  # its file goes when it ends
            holder = f"process {int(file.read_text())}"
        raise InputError(f"{folder} is in use by {holder}; wait for its end") from None
    except (OSError, portalocker.LockException) as error:
        raise InputError(f"{folder} cannot be locked for writing: {reason(error)}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # what has something in it stays
            path.rmdir()
        lock.release()
        with suppress(OSError):
            for parent in new[1:]:
                parent.rmdir()


def make_folder(path: Path) -> None:
    """With those that it lies in, unless it is there. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {path} cannot be made: {reason(error)}") from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename: a kill leaves the old file or the new one whole.
    So does a full disk or a missing permission, which raises InputError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with signals_wait():
            write(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # some libraries write files for their owner alone
            os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written; is there no room? {reason(error)}") from error


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")
