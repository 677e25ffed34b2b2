"""Several processes, started by torchrun, that do together what one would with the whole batch."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return world()[0] == 0


def say(text: str) -> None:
    """Print it, once for all processes, also before `torchrun`."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def sum_over_processes(*tensors: Tensor | None) -> None:
    """Add up tensors (None: nothing) over all processes, in place and in one message."""
    if not dist.is_initialized():
        return
    tensors = [x for x in tensors if x is not None]
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(total.view_as(x))


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def torchrun(device: torch.device) -> Iterator[torch.device]:
    """Within `with`, the processes that torchrun has started know each other; gives this one's
    device. Without torchrun nothing changes."""
    if "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # the others wait while the first evaluates, which may take longer than torch's 10 minutes
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=30))
    if not is_first():  # the first saves the state, after a step of all
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    try:
        yield device
    except RuntimeError as error:
        if is_first() or not re.search("by peer|remote process exited", str(error)):
            raise
        raise SystemExit(1) from None  # the first has ended, and has said why
    # gloo's threads need Python's lock to let go of the last sum's tensor; in torch 2.6 the end of
    # the group waits for them with the lock in hand, so they are given the time to do so before
    time.sleep(0.1)
    dist.destroy_process_group()
