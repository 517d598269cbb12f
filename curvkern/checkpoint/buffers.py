"""Memory that is read into: that of tensors that are gone serves those to come."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress

import torch

_PAGE = 2 << 20
_MOST_FREE = 256 << 20


class Buffers:
    """Areas of memory that come back by themselves when nothing refers to their tensor any more.

    The system fills fresh pages with zeros before a read fills them once more, so that a read into memory at hand takes
    half the time. Areas are in large pages; at most 256 MiB wait unused, or what `keeping` says. Safe from several
    threads.
    """

    def __init__(self, most_free: int = _MOST_FREE) -> None:
        self._most_free = most_free
        self._free: list[mmap.mmap] = []

    @property
    def free(self) -> int:
        """Bytes that wait."""
        return sum(map(len, self._free))

    @contextmanager
    def keeping(self, most_free: int) -> Generator[None]:
        """Inside, at most so many bytes wait unused."""
        before, self._most_free = self._most_free, most_free
        self._let_go()
        try:
            yield
        finally:
            self._most_free = before

    def take(self, count: int) -> torch.Tensor:
        """A uint8 tensor of ``count`` bytes, of any contents; views of it keep the memory too."""
        area = self._fitting(count) or _area(count)
        # The tensor holds the view, and only the view: its end is that of the last tensor.
        view = memoryview(area)
        weakref.finalize(view, self._give, area).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8, count=count)

    def _fitting(self, count: int) -> mmap.mmap | None:
        """A free area that is not much too large."""
        for area in tuple(self._free):
            if count <= len(area) <= count + count // 4 + _PAGE:
                try:
                    self._free.remove(area)
                except ValueError:  # another thread was faster
                    continue
                return area
        return None

    def _give(self, area: mmap.mmap) -> None:
        # No lock: this runs wherever a tensor ends, perhaps inside `take`. Appending is atomic.
        self._free.append(area)
        self._let_go()

    def _let_go(self) -> None:
        while self.free > self._most_free:
            with suppress(IndexError):  # another thread was faster
                self._free.pop(0)


def _area(count: int) -> mmap.mmap:
    area = mmap.mmap(-1, -(-count // _PAGE) * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return area
