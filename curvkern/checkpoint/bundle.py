"""`Bundle`: the same tensor of several checkpoints at once, read ahead within a memory bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from threading import Condition, Thread

import torch

from curvkern.checkpoint.agree import Source, check_agreement
from curvkern.checkpoint.error import CheckpointError
from curvkern.checkpoint.shard import BUFFERS

Tensors = dict[str, torch.Tensor]

_MAX_BYTES = 256 << 20


class Bundle:
    """Several checkpoints of one model, walked tensor by tensor.

    Attributes:
        sources: Role to checkpoint; the bundle does not close them.
        names: The tensors that all of them have, in the file order of "tuned" (of the first, where
            no role is called so).
        device: Where the tensors go.
        skipped: Tensors left out of `names`, with the reason (buffers; a head that one side ties).
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        max_bytes: int = _MAX_BYTES,
        device: str | torch.device = "cpu",
        check_vocabulary: bool = True,
    ) -> None:
        """Check the checkpoints against each other; no tensor is read.

        Args:
            sources: Role ("aligned", "tuned", "base", ...) to `Checkpoint` or `TunedView`.
            max_bytes: Most bytes read ahead and not yet given up by the loop; as many wait unused for reads to
                come. A tensor set larger than this passes alone.
            device: Where the tensors go.
            check_vocabulary: Also refuse tokenizers that give one id to different tokens.

        Raises:
            CheckpointError: They are not of one model (see `check_agreement`).
        """
        if not sources:
            raise CheckpointError("a bundle needs at least one checkpoint")
        self.sources = dict(sources)
        self.skipped = check_agreement(self.sources, vocabulary=check_vocabulary)
        order = self.sources.get("tuned", next(iter(self.sources.values())))
        self.names = tuple(name for name in order.names if name not in self.skipped)
        self._max_bytes = max_bytes
        self.device = torch.device(device)

    def nbytes(self, name: str) -> int:
        """Return the size of ``name`` in all checkpoints together."""
        return sum(source.spec(name).nbytes for source in self.sources.values())

    def read(self, name: str) -> Tensors:
        """Read ``name`` from every checkpoint, each in its own dtype."""
        return {role: source.read(name, self.device) for role, source in self.sources.items()}

    def stream(
        self, names: Iterable[str] | None = None, max_bytes: int | None = None
    ) -> Generator[tuple[str, Tensors]]:
        """Yield (name, tensors by role) for ``names`` (default: all), read ahead by one thread.

        A tensor set counts against ``max_bytes`` (default: the bundle's) until the loop asks for the next one.

        Raises:
            CheckpointError: What a read raises, where the loop reaches it.
        """
        most = self._max_bytes if max_bytes is None else max_bytes
        with BUFFERS.keeping(most):
            reader = _Reader(self, self.names if names is None else tuple(names), most)
            try:
                yield from reader.results()
            finally:
                reader.stop()

    def __iter__(self) -> Iterator[tuple[str, Tensors]]:
        return self.stream()

    def __len__(self) -> int:
        return len(self.names)


class _Reader:
    """A thread that reads ahead of the loop that consumes its results."""

    def __init__(self, bundle: Bundle, names: tuple[str, ...], max_bytes: int) -> None:
        self._bundle = bundle
        self._names = names
        self._max_bytes = max_bytes
        self._ready: deque[tuple[str, Tensors]] = deque()
        self._held = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._read_all, name="curvkern-read", daemon=True)
        self._thread.start()

    def results(self) -> Iterator[tuple[str, Tensors]]:
        """Yield what was read, in order; raise what stopped the thread."""
        for name in self._names:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._failure)
                if self._failure is not None and not self._ready:
                    raise self._failure
                item = self._ready.popleft()
            yield item
            # The generator must not keep the set alive while the next one is read.
            del item
            self._release(name)

    def stop(self) -> None:
        """End the thread, at the latest when the read it is in returns."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _release(self, name: str) -> None:
        with self._changed:
            self._held -= self._bundle.nbytes(name)
            self._changed.notify_all()

    def _read_all(self) -> None:
        try:
            for name in self._names:
                if not self._reserve(self._bundle.nbytes(name)):
                    return
                item = (name, self._bundle.read(name))
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                del item
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _reserve(self, size: int) -> bool:
        """Wait until ``size`` more bytes fit, or nothing else is held; False once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._held or self._held + size <= self._max_bytes)
            self._held += size
            return not self._stopped
