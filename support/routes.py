"""What a gate has chosen, noted on the device so that training hardly feels it."""

import torch
from torch import Tensor, nn

from support.processes import sum_over_processes, world


class RouteLog(nn.Module):
    """`counts[t, j]`: how many sequences had layer j chosen in slot t; and for training, since the
    last `summary`, how the choices changed."""

    def __init__(self, T: int, slots: list[int], K: int, route: str) -> None:
        super().__init__()
        self.K, self.route = K, route
        self.open = []  # (picks, mean affinity) of each slot of the pass under way
        starts = dict(numbers=torch.arange(T), slots=torch.tensor(slots))
        starts["counts"] = torch.zeros(T, T, dtype=torch.long)
        starts["last"] = torch.full((len(slots), K), -1)
        starts["sums"] = torch.zeros(6, dtype=torch.float64)
        for name, start in starts.items():
            self.register_buffer(name, start, persistent=False)

    def begin_pass(self) -> None:
        self.open = []

    def add(self, picks: Tensor, affinity: Tensor) -> None:
        """A slot has chosen: picks (1 or B, K), mean affinity of every layer (1 or B, T)."""
        self.open.append((picks, affinity))

    @torch.no_grad()
    def end_pass(self, B: int, load_balance: Tensor | None) -> None:
        """Count what was added, for B sequences; `load_balance` is the loss in training."""
        if not self.open:
            return
        picks = torch.stack([p for p, _ in self.open])  # (slots, 1 or B, K)
        affinity = torch.stack([a for _, a in self.open])  # (slots, 1 or B, T)
        self.open = []
        each = (picks[..., None] == self.numbers).sum((1, 2))
        self.counts.index_add_(0, self.slots, each * (B // picks.shape[1]))
        if load_balance is None:
            return
        mean = affinity.gather(-1, picks).mean((1, 2))
        own = (picks == self.slots[:, None, None]).any(2).to(mean.dtype).mean(1)
        pick = picks[:, 0]  # the batch's
        changed = ((pick != self.last) & (self.last >= 0)).any(1)
        found = torch.stack([torch.ones_like(mean), changed, own, mean]).sum(1)
        passes = found[0] / len(pick)
        self.sums += torch.cat([found, torch.stack([passes, load_balance])])
        self.last.copy_(pick)

    def training_state(self) -> dict[str, Tensor]:
        """What a run has to save of this."""
        return {"sums": self.sums, "last": self.last}

    def shares(self) -> Tensor:
        """For how many of the sequences, in %, layer j was chosen in slot t: (T, T), rows t. With
        K = 2 a row adds up to 200; that of a slot that does not mix, to 0."""
        counts = self.counts.cpu()
        return 100 * self.K * counts / counts.sum(1, keepdim=True).clamp(min=1)

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Since the last call: the shares of votes that changed a slot's layers (not where each
        sequence decides) and that took its own one, the mean affinity of the chosen layers, the
        load-balance loss. Of all processes, which call it at the same steps."""
        sum_over_processes(self.sums)
        votes, changed, own, affinity, passes, balance = self.sums.tolist()
        self.sums.zero_()
        votes, passes = max(1, votes), max(1, passes)
        shares = dict(changed=changed / votes) if self.route == "batch" else {}
        shares.update(own=own / votes, affinity=affinity / votes)
        return dict(shares, balance=balance * world()[1] / passes)  # each has a share of the loss
