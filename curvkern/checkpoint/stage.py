"""`Stage`: the directory beside the target in which an output grows until it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from curvkern.checkpoint.card import as_json
from curvkern.checkpoint.error import CheckpointError, listed
from curvkern.checkpoint.fingerprint import differences
from curvkern.checkpoint.locate import TEMPLATES, expected

RECORD = "curvkern.json"
# Lies in the directory while it is unfinished: a finished output that is itself called *.partial has none.
STATE = "curvkern.unfinished.json"
W = TypeVar("W", bound="Output")
_SIGNED = ("recipe", "inputs", "output", "software")


def check_target(out: str | Path, roots: Iterable[Path], *, overwrite: bool) -> Path:
    """Return ``out`` as an absolute path, after checking that an output may appear there.

    Args:
        out: The directory to be made.
        roots: The inputs' paths; none of them may be at risk.
        overwrite: Whether a checkpoint that is there already may be replaced.

    Raises:
        CheckpointError: It exists (and ``overwrite`` is not set, or it holds anything that is not a
            checkpoint's), it or a directory used meanwhile overlaps an input, or it cannot be
            renamed to.
    """
    target = Path(out).expanduser().resolve()
    sources = [root.expanduser().resolve() for root in roots]
    for place in (target, _partial(target), _previous(target)):
        _refuse_overlap(target, place, sources)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; wanted a directory to make")
    if os.path.ismount(target):
        raise CheckpointError(f"{target}: is a mount point; choose a directory inside it")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not overwrite:
        raise CheckpointError(f"{target}: exists and is not empty; pass overwrite=True (--overwrite) to replace it")
    if occupied:
        _refuse_strangers(target)
    if _previous(target).exists():
        raise CheckpointError(
            f"{_previous(target)}: an earlier output, left when its replacement was cut short; move "
            f"it back to {target} or delete it"
        )
    return target


class Output(ABC):
    """A directory that is finished, or not there at all once its writer's context is left.

    Attributes:
        target: the directory.
    """

    target: Path
    _finished = False

    @abstractmethod
    def abort(self) -> None:
        """Give up: what was at the target stays."""

    def __enter__(self: W) -> W:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._finished:
            return
        self.abort()
        if exception is None:
            raise CheckpointError(f"{self.target}: the writer was left before finish(): no output")


class Stage:
    """``OUT.partial``: locked while it is written, recorded shard by shard, renamed when whole.

    Its ``curvkern.unfinished.json`` tells what is being made (recipe, inputs, layout, software) and
    which shards are complete, so that a killed run can go on.

    Attributes:
        directory: Where the files go.
        complete: Names of the shards an earlier run finished.
        notes: Tensor name to what the run has to say about it, recorded along with the shards.
    """

    def __init__(self, target: Path, signature: dict[str, Any], *, overwrite: bool, resume: bool) -> None:
        """Make or take over the directory.

        Raises:
            CheckpointError: Another run holds it, it is not an unfinished output, or (with
                ``resume``) it was begun with another recipe, other inputs or another layout.
        """
        self.target = target
        self.directory = _partial(target)
        self._signature = signature
        self._overwrite = overwrite
        self._lock = self._enter()
        self.complete: list[str] = []
        self.notes: dict[str, dict[str, Any]] = {}
        try:
            earlier = self._earlier()
            if resume and earlier is not None:
                self.complete = self._agreed_shards(earlier)
                self.notes = earlier["notes"] if self.complete else {}
        except BaseException:
            self.release()
            raise
        try:
            if not self.complete:
                self._clear()
            self.record()
        except BaseException:
            self.release() if resume else self.discard()
            raise

    def record(self, *shards: str) -> None:
        """Note that ``shards`` are complete: their data must have reached the disk."""
        self.complete.extend(shards)
        self.write(STATE, as_json({**self._signature, "complete": self.complete, "notes": self.notes}))
        _sync_directory(self._lock)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file so that it is there whole or not at all."""
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        draft = path.with_name(f"{path.name}.tmp")
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def publish(self) -> None:
        """Give the directory its final name; an old output there is swapped out and removed."""
        _sync_directory(self._lock)
        previous = _previous(self.target)
        occupied = self.target.is_dir() and any(self.target.iterdir())
        if occupied and not self._overwrite:
            raise CheckpointError(f"{self.target}: appeared while its replacement was being written")
        if occupied:
            self.target.rename(previous)
        try:
            self.directory.rename(self.target)
        except BaseException:
            if occupied:
                previous.rename(self.target)
            raise
        with suppress(OSError):
            (self.target / STATE).unlink()
        parent = os.open(self.target.parent, os.O_RDONLY)
        _sync_directory(parent)
        os.close(parent)
        if occupied:
            shutil.rmtree(previous, ignore_errors=True)
        self.release()

    def discard(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Unlock the directory and leave it as it is; releasing twice is harmless."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _enter(self) -> int:
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have published it between the opening and the locking.
            free = os.path.samestat(os.fstat(lock), self.directory.stat())
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError:
            # Some network mounts have no locks; there it is the user who keeps two runs apart.
            pass
        if not free:
            os.close(lock)
            raise CheckpointError(f"{self.directory}: another run is writing there")
        return lock

    def _earlier(self) -> dict[str, Any] | None:
        """Return what an earlier run recorded, None if it left nothing."""
        names = {p.name for p in self.directory.iterdir()}
        with suppress(OSError, ValueError):
            record = json.loads((self.directory / STATE).read_text(encoding="utf-8"))
            if isinstance(record, dict) and all(key in record for key in (*_SIGNED, "complete", "notes")):
                return cast("dict[str, Any]", record)
        if names - {STATE, f"{STATE}.tmp"}:
            raise CheckpointError(f"{self.directory}: exists and is not an unfinished output; move it away")
        return None

    def _agreed_shards(self, earlier: dict[str, Any]) -> list[str]:
        now = json.loads(as_json(self._signature))
        changes = [c for key in _SIGNED for c in differences(key, earlier[key], now[key])]
        if changes:
            raise CheckpointError(
                f"{self.directory}: cannot resume, it was begun differently: {listed(changes)}. "
                "Restore the former settings, or run without resume to start again"
            )
        sizes = {name: file["bytes"] for name, file in now["output"].items()}
        return [name for name in earlier["complete"] if self._size(name) == sizes.get(name)]

    def _size(self, name: str) -> int:
        path = self.directory / name
        return path.stat().st_size if path.is_file() else -1

    def _clear(self) -> None:
        """Remove all but the state, without which no later run would know the rest for its own."""
        for path in self.directory.iterdir():
            if path.name == STATE:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network mounts cannot do this for a directory; their renames are durable or are not.
        if error.errno != errno.EINVAL:
            raise


def _refuse_overlap(target: Path, place: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        inside = source.is_dir() and place.is_relative_to(source)
        if inside or source.is_relative_to(place):
            what = "overlaps" if place == target else f"is made by way of {place}, which overlaps"
            raise CheckpointError(f"{target}: {what} the input {source}; choose another directory")


def _refuse_strangers(target: Path) -> None:
    """Only what a checkpoint has may be replaced: someone's other files are not ours to delete."""
    held = sorted(target.iterdir())
    own = _own_files(target)
    if not own and not any(path.name.endswith((".safetensors", "config.json")) for path in held):
        raise CheckpointError(f"{target}: holds no checkpoint ({_names(held)}), so it is not overwritten")
    if (target / TEMPLATES).is_dir():
        held = [path for path in held if path.name != TEMPLATES] + sorted((target / TEMPLATES).iterdir())
    known = own | {RECORD, STATE}
    strange = [
        path
        for path in held
        if path.is_dir()
        or not (path.relative_to(target).as_posix() in known or expected(path.relative_to(target).as_posix()))
    ]
    if strange:
        raise CheckpointError(
            f"{target}: holds {_names(strange)}, which no checkpoint has, so it is not overwritten; move "
            "that away, or choose another directory"
        )


def _own_files(target: Path) -> set[str]:
    """Return what the record of a finished output lists, nothing where there is none."""
    with suppress(OSError, ValueError):
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and all(key in record for key in (*_SIGNED, "files")):
            return set(cast("dict[str, list[str]]", record)["files"])
    return set()


def _names(paths: Iterable[Path]) -> str:
    return listed(f"{path.name}/" if path.is_dir() else path.name for path in paths)


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _previous(target: Path) -> Path:
    return target.with_name(f"{target.name}.previous")
