"""A guard's own data, beside the user's: batches without an end, and their mean over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]


class Endless:
    """Batches in turn, again from the first after the last.

    Args:
        who: the guard, for messages.
        batches: a DataLoader, a list: anything that can be gone through again; each a mapping for ``model(**batch)``.

    Attributes:
        drawn: how many have been taken.

    Raises:
        TypeError: ``batches`` is an iterator, which would end.
    """

    def __init__(self, who: str, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Iterator):
            raise TypeError(f"{who}: batches is {type(batches).__name__}, which ends; pass a list or a DataLoader.")
        self.who, self.batches = who, batches
        self.drawn = 0
        self._iterator: Iterator[Batch] = iter(())

    def draw(self, device: torch.device) -> Batch:
        """The next batch, its tensors on a device.

        Raises:
            ValueError: there are no batches.
        """
        batch = self._next()
        self.drawn += 1
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def skip_to(self, drawn: int) -> None:
        """Go on as if ``drawn`` batches had been taken: exactly so where their order is the same in every round."""
        self.drawn, self._iterator = drawn, iter(self.batches)
        for _ in range(drawn % len(self.batches) if isinstance(self.batches, Sized) and len(self.batches) else drawn):
            self._next()

    def _next(self) -> Batch:
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator = iter(self.batches)
            batch = next(self._iterator, None)
        if batch is None:
            raise ValueError(f"{self.who}: there are no batches; wanted at least one.")
        return batch


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model of transformers computes itself."""
    return model(**batch).loss


def mean_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Each rank's tensors become the mean over all ranks; nothing where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        waiting = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in waiting:
            if work is not None:
                work.wait()
        for tensor in tensors:
            tensor /= size
