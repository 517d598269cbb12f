"""Several processes over the same data: each takes a share of the samples, and all end with the sums of all."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvkern.curvature.hidden import CurvatureError
from curvkern.curvature.statistics import ROWS, Counts
from curvkern.curvature.texts import Text, edges

#: quantity and parameter
_Key = tuple[str, str]
#: shape, dtype, and the key of the first that is the same tensor
_Kind = tuple[torch.Size, torch.dtype, _Key]


@contextmanager
def joined() -> Generator[None]:
    """Inside, a process that torchrun started belongs to the group of all of them."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group()  # Gloo for tensors in memory, NCCL for those on a GPU
    try:
        yield
    finally:
        dist.destroy_process_group()


class Ranks:
    """The processes of the default group; where there is none, the one process, which waits for nobody.

    Attributes:
        rank: this one's number, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.count: int = dist.get_world_size() if together else 1

    def device(self, device: str) -> str:
        """``"cuda"`` as the GPU of this rank's place on its node."""
        return f"cuda:{dist.get_node_local_rank(0)}" if device == "cuda" and self.count > 1 else device

    def share(self, texts: Sequence[Text], begin: int, tokens: int) -> tuple[int, int]:
        """Where this rank's samples start and stop: whole batches, about as many tokens for each rank.

        Raises:
            CurvatureError: there are fewer batches than ranks.
        """
        if self.count == 1 or begin == len(texts):
            return begin, len(texts)
        starts = edges(texts, tokens, begin)
        batches = len(starts) - 1
        if batches < self.count:
            raise CurvatureError(
                f"estimate: {len(texts) - begin} rows are {batches} batches of {tokens} tokens, too few for "
                f"{self.count} ranks; pass a smaller batch_tokens, or run fewer ranks"
            )
        sizes = [sum(len(text.ids) for text in texts[a:b]) for a, b in pairwise(starts)]
        cuts = _cuts(sizes, self.count)
        return starts[cuts[self.rank]], starts[cuts[self.rank + 1]]

    def gathered(self, mine: Any) -> list[Any]:
        """What each rank has, by rank."""
        every: list[Any] = [mine]
        if self.count > 1:
            every = [None] * self.count
            dist.all_gather_object(every, mine)
        return every

    def require_same(self, **values: Any) -> None:
        """Refuse ranks that were asked for different things.

        Raises:
            CurvatureError: names the value, on every rank.
        """
        for rank, theirs in enumerate(every := self.gathered(values)):
            for name, value in theirs.items():
                if value != every[0][name]:
                    raise CurvatureError(
                        f"estimate: {name} is {every[0][name]!r} on rank 0 and {value!r} on rank {rank}; all ranks "
                        "take the same arguments and all of the data, of which each does its share"
                    )

    @contextmanager
    def together(self) -> Generator[None]:
        """An error inside is one on all ranks: none waits for sums that do not come."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.count == 1:
                raise
            error = caught
        told = self.gathered(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, message in enumerate(told):
            if message is not None:
                raise CurvatureError(f"rank {rank}: {message}")

    def counted(self, counts: Counts) -> Counts:
        """The counts of all."""
        return sum(self.gathered(counts), Counts())

    def summed(
        self, found: Mapping[str, Mapping[str, Tensor]], rows: range, device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """The sums of all ranks, on each; of quantities with one row a sample, the rows of all in order.

        Args:
            found: quantity -> parameter -> this rank's tensor; what several names share stays shared.
            rows: this rank's samples among those of all ranks.
            device: where sums are made that only other ranks have, as of an expert that none of these tokens came to.

        Raises:
            CurvatureError: modules had their inputs in common on one rank and not on another.
        """
        if self.count == 1:
            return {quantity: dict(of) for quantity, of in found.items()}
        total = max(self.gathered(rows.stop))
        held = {(quantity, name): tensor for quantity, of in found.items() for name, tensor in of.items()}
        out: dict[str, dict[str, Tensor]] = {}
        for (quantity, name), (shape, dtype, first) in self._kinds(held).items():
            of = out.setdefault(quantity, {})
            if first != (quantity, name):
                of[name] = out[first[0]][first[1]]
                continue
            mine = held.get((quantity, name))
            if quantity in ROWS:
                whole = torch.zeros(total, *shape[1:], dtype=dtype, device=device)
                if mine is not None:
                    whole[rows.start : rows.stop] = mine
                mine = whole
            elif mine is None:
                mine = torch.zeros(shape, dtype=dtype, device=device)
            wide = mine.float()  # not every backend adds bfloat16; of rows, all but one rank's are 0
            dist.all_reduce(wide)
            of[name] = mine.copy_(wide)
        return out

    def _kinds(self, held: Mapping[_Key, Tensor]) -> dict[_Key, _Kind]:
        """What tensors there are on any rank, in one order on all."""
        first: dict[int, _Key] = {}
        mine = {key: (t.shape, t.dtype, first.setdefault(id(t), key)) for key, t in held.items()}
        every: dict[_Key, _Kind] = {}
        for theirs in self.gathered(mine):
            for key, kind in theirs.items():
                if every.setdefault(key, kind)[2] != kind[2]:
                    raise CurvatureError(
                        f"estimate: {key[1]} had its inputs in common with {kind[2][1]} on one rank, not on another; "
                        "leave one of them out with exclude"
                    )
        return every

    def from_first(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Overwrite with rank 0's: eigenvectors that two machines compute may differ by more than rounding."""
        if self.count > 1:
            for tensor in (tensor for of in found.values() for tensor in of.values()):
                rows = tensor.contiguous()  # LAPACK's eigenvectors lie column by column
                dist.broadcast(rows, 0)
                tensor.copy_(rows)


def _cuts(sizes: Sequence[int], parts: int) -> list[int]:
    """Where to cut a row of sizes into parts that are not empty, each cut where the sum is nearest to its share."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    cuts = [0]
    for part in range(1, parts):
        allowed = range(cuts[-1] + 1, len(sizes) - (parts - part) + 1)
        cuts.append(min(allowed, key=lambda at: abs(ends[at] * parts - ends[-1] * part)))
    return [*cuts, len(sizes)]
