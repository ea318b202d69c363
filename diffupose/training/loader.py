"""Batches drawn in advance by other processes, so that the training device does not wait."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffupose.training.batches import Batches, TrainBatch

_AHEAD = 4  # batches that a worker draws in advance


class _Steps(Dataset[tuple[Tensor, Tensor]]):
    """The batches of steps [first, last)."""

    def __init__(self, batches: Batches, first: int, last: int) -> None:
        self.batches, self.first, self.last = batches, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = self.batches.batch(self.first + index)
        return batch.condition, batch.poses_3d


def load_batches(batches: Batches, first: int, last: int, workers: int, device: torch.device) -> Iterator[TrainBatch]:
    """Yield the batches of steps ``[first, last)`` in order, on a device.

    Args:
        batches: Source; on the CPU where there are workers.
        first: The first step.
        last: The step after the last one.
        workers: Processes that draw; 0 draws in this process, on demand. A batch is the same either way: it depends on
            its step and on the device of its source.
        device: Where the batches are needed.
    """
    if workers == 0:
        yield from (batches.batch(step) for step in range(first, last))
        return
    pinned = device.type == "cuda"
    loader = DataLoader(
        _Steps(batches, first, last), batch_size=None, num_workers=workers, prefetch_factor=_AHEAD, pin_memory=pinned
    )
    for condition, poses_3d in loader:
        yield TrainBatch(condition.to(device, non_blocking=True), poses_3d.to(device, non_blocking=True))
