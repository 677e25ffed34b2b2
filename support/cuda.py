"""What pays off on a GPU alone: a second stream, a choice that the CPU never reads, CUDA graphs.

Nothing here knows what a layer or a training step is; molex.py and train.py hand them in.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from support.files import InputError
from support.processes import world

_SIDE: dict[torch.device, torch.cuda.Stream] = {}


def share(*tensors: Tensor | None) -> torch.cuda.Stream | None:
    """The second stream of the tensors' device, which may read them: their memory is not used
    again before it is done with them. None on the CPU."""
    device = tensors[0].device
    if device.type != "cuda":
        return None
    if device not in _SIDE:
        _SIDE[device] = torch.cuda.Stream(device)
    for x in tensors:
        if x is not None:
            x.record_stream(_SIDE[device])
    return _SIDE[device]


def fork(z: Tensor) -> torch.cuda.Stream | None:
    """The second stream, which goes on from here and may read z; None on the CPU."""
    side = share(z)
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(z.device))
    return side


def join(side: torch.cuda.Stream | None, outputs: list[tuple[Tensor | None, ...]]) -> None:
    """The current stream waits for the second one, and may then use what that has made."""
    if side is None:
        return
    main = torch.cuda.current_stream(side.device)
    main.wait_stream(side)
    for x in (x for group in outputs for x in group if x is not None):
        x.record_stream(main)


class LayerBank:
    """Runs block number j of a list of like blocks, where j is a tensor that the CPU never reads.
    The weights of all blocks lie in one matrix, a row each; row j is then put into the first block.
    In training its dropout is not that of block j itself."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.matrices: list[tuple[dict[str, torch.Size], Tensor]] = []

    def fill(self) -> None:
        """Take the blocks' present weights; once a pass. One matrix for each dtype, and for what
        is trained and what is not."""
        groups: dict[tuple, dict[str, torch.Size]] = defaultdict(dict)
        for name, p in self.blocks[0].named_parameters():
            groups[p.dtype, p.requires_grad][name] = p.shape
        self.matrices = []
        for shapes in groups.values():
            rows = [block.get_parameter(name).flatten() for block in self.blocks for name in shapes]
            self.matrices.append((shapes, torch.cat(rows).view(len(self.blocks), -1)))

    def __call__(self, j: Tensor, *args: object) -> Tensor:
        """Block j, a number of shape (1,), on these arguments."""
        weights = {}
        for shapes, matrix in self.matrices:
            row = matrix.index_select(0, j)[0]
            pieces = row.split([shape.numel() for shape in shapes.values()])
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
                weights[name] = piece.view(shape)
        return functional_call(self.blocks[0], weights, args)

    def tensors(self) -> list[Tensor]:
        return [matrix for _, matrix in self.matrices]

    def clear(self) -> None:
        self.matrices = []


def check_graphs(s: Any, device: torch.device) -> None:
    """Raise InputError unless a run's steps can be CUDA graphs. `s`: its settings."""
    alone = device.type == "cuda" and s.accumulate == world()[1] == 1
    if not (alone and (s.molex is None or s.molex.on_device)):
        needs = "a GPU, one process, --accumulate 1, MoLEx --on-device"
        raise InputError(f"--cuda-graphs needs {needs}")


class GraphedStep:
    """A training step as CUDA graphs, one for each shape of a batch: one launch, not thousands.
    `collate` makes a batch of examples, a tuple of tensors; `step` takes it, and must read no value
    on the CPU. The first batch of a shape runs as it is, so that what is made lazily is made; the
    second is captured."""

    def __init__(
        self, step: Callable, collate: Callable, optimizer: Optimizer, device: torch.device
    ) -> None:
        self.step, self.collate, self.optimizer, self.device = step, collate, optimizer, device
        self.steps, self.pool = {}, None

    def __call__(self, examples: list) -> Tensor:
        if not self.steps:  # a graph reads the rate from where the schedule writes it
            for group in self.optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], device=self.device)
                group["capturable"] = self.device.type == "cuda"
        batch = self.collate(examples)
        shape = tuple(x.shape for x in batch)
        if shape not in self.steps:
            self.steps[shape] = None
            return self.step(batch.to(self.device))
        if self.steps[shape] is None:
            fixed = batch.to(self.device)
            self.steps[shape] = fixed, self.capture(fixed)
        fixed, replay = self.steps[shape]
        for x, new in zip(fixed, batch, strict=True):
            x.copy_(new)
        return replay()

    def capture(self, batch: tuple) -> Callable[[], Tensor]:
        """A step on what `batch` will hold, as a function that launches it."""
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.step(batch)

        def replay() -> Tensor:
            graph.replay()
            return loss.clone()

        return replay
