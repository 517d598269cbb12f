"""`Flush`: what was written goes to the disk while the next tensors are made."""

from __future__ import annotations

import os
from threading import Thread

_AT_ONCE = 64 << 20


class Flush:
    """Asks for written data to reach the disk, every 64 MiB, on a thread of its own.

    Left to itself, the system would begin when the file is synced, and the run would wait for all of it.
    """

    def __init__(self, at_once: int = _AT_ONCE) -> None:
        self._at_once = at_once
        self._pending = 0
        self._thread: Thread | None = None
        self._failure: OSError | None = None

    def wrote(self, fd: int, count: int) -> None:
        """Note that ``count`` more bytes were written to ``fd``, which stays open until `wait`.

        Raises:
            OSError: An earlier flush failed.
        """
        self._pending += count
        if self._pending < self._at_once or (self._thread is not None and self._thread.is_alive()):
            return
        self.wait()
        self._pending = 0
        self._thread = Thread(target=self._flush, args=(fd,), name="curvkern-flush", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for what is on its way.

        Raises:
            OSError: It did not arrive.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _flush(self, fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError as error:
            self._failure = error
