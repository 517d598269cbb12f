"""`Writer`: a checkpoint that is whole on disk, or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

from curvkern.checkpoint.adapter import Adapter
from curvkern.checkpoint.agree import Source
from curvkern.checkpoint.card import as_json, describe, model_card, plain, versions
from curvkern.checkpoint.error import CheckpointError, listed, on_disk
from curvkern.checkpoint.fingerprint import contents, fingerprint
from curvkern.checkpoint.flush import Flush
from curvkern.checkpoint.format import TensorSpec, tensor_bytes
from curvkern.checkpoint.layout import Layout
from curvkern.checkpoint.locate import read_json, source_name
from curvkern.checkpoint.stage import RECORD, STATE, Output, Stage, check_target
from curvkern.trace import span

_INDEX = "model.safetensors.index.json"
# What file systems without preallocation answer.
_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Writer(Output):
    """Writes a checkpoint tensor by tensor, in any order, laid out like another one.

    Headers and offsets are fixed before any data exists, so a tensor goes straight to its place and
    no shard is ever held in memory. Everything happens in ``OUT.partial``; `finish` renames it to
    ``OUT``. Use it as a context manager: an exception leaves nothing at ``OUT``, and removes
    ``OUT.partial`` unless ``resume`` is set. One thread at a time may write.

    Attributes:
        target: Where the checkpoint will appear.
        names: The tensors to write, in file order.
    """

    def __init__(
        self,
        out: str | Path,
        like: Source,
        *,
        overwrite: bool = False,
        resume: bool = False,
        dtype: torch.dtype | None = None,
        recipe: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Source | Adapter] | None = None,
        data: Mapping[str, Path] | None = None,
    ) -> None:
        """Check the target and the free space, lay out the files and reserve their room.

        Args:
            out: The directory to make.
            like: Gives files, order, shapes and dtypes, and the configuration and tokenizer files.
            overwrite: Replace a checkpoint at ``out``, once the new one is whole.
            resume: Go on where a killed run with the same recipe and inputs stopped, and keep what
                is finished if this one fails.
            dtype: Store floating-point tensors in this dtype instead.
            recipe: What is being done, as JSON; goes into ``curvkern.json``.
            inputs: Role to every checkpoint that the output is made from; default: ``like`` alone.
            data: Role to every other file that decides what is written, such as prompts.

        Raises:
            CheckpointError: ``out`` cannot be made or is in use, the disk is too small, or a run
                to resume was begun differently.
        """
        inputs, data = {"like": like} if inputs is None else inputs, data or {}
        self._like, self._resume, self._dtype = like, resume, dtype
        self._inputs = tuple(inputs.values())
        self._recipe = plain(recipe or {})
        paths = {role: source.path for role, source in inputs.items()} | {**data}
        self._sources = {role: source_name(path) for role, path in paths.items()}
        self._layout = Layout(like, dtype)
        self.names = tuple(self._layout.specs)
        roots = [root for source in (like, *inputs.values()) for root in source.roots] + [*data.values()]
        self.target = check_target(out, roots, overwrite=overwrite)
        self._signature = {
            "recipe": self._recipe,
            "inputs": {role: fingerprint(source) for role, source in {**inputs, **data}.items()},
            "output": self._layout.signature(),
            "software": versions()["curvkern"],
        }
        self._open: dict[str, int] = {}
        self._flush = Flush()
        self._pool = ThreadPoolExecutor(1, "curvkern-write")
        self._ahead: Future[None] | None = None
        with self._disk("making the output directory"):
            self._stage = Stage(self.target, self._signature, overwrite=overwrite, resume=resume)
        self._left = {f: set[str]() for f in self._layout.heads if f not in self._stage.complete}
        self._done: set[str] = set()
        for name, spec in self._layout.specs.items():
            self._left.get(spec.file, self._done).add(name)
        try:
            self._reserve()
        except BaseException:
            self.abort()
            raise

    @property
    def done(self) -> Set[str]:
        """Names of the tensors written so far, those of an earlier run included; grows."""
        return self._done

    def spec(self, name: str) -> TensorSpec:
        """Return what the output's tensor ``name`` will be, and where.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self._layout.specs:
            raise CheckpointError(f"{self.target}: no tensor {name} in the layout")
        return self._layout.specs[name]

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        """What was noted of the tensors in `done`, by an earlier run or this one."""
        return {name: note for name, note in self._stage.notes.items() if name in self._done}

    def write(self, name: str, tensor: torch.Tensor, note: Mapping[str, Any] | None = None) -> None:
        """Write one tensor to its place; returns while it is still on its way.

        Args:
            name: One of `names`.
            tensor: What to store; not to be changed before the next call.
            note: What a resumed run should know of it, as JSON; see `notes`.

        Raises:
            CheckpointError: Unknown or already written name, another shape or dtype than `spec`
                says (nothing is cast here), an input that changed meanwhile, or a full disk, now or at the
                tensor before.
        """
        spec = self.spec(name)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{self.target}: {name}: got {tensor.dtype} {list(tensor.shape)}, "
                f"wanted {spec.dtype} {list(spec.shape)}"
            )
        if note is not None:
            self._stage.notes[name] = dict(note)
        self._put(spec, (tensor_bytes(tensor.cpu()),))

    def copy(self, name: str) -> None:
        """Copy one tensor from ``like``, byte for byte (or cast, where ``dtype`` asks for it).

        Raises:
            CheckpointError: Unknown or already written name, or a full disk.
        """
        spec = self.spec(name)
        if spec.dtype == self._like.spec(name).dtype:
            self._put(spec, self._like.blocks(name))
        else:
            self.write(name, self._like.read(name).to(spec.dtype))

    def copy_rest(self) -> None:
        """Copy every tensor that is not written yet."""
        for name in self.names:
            if name not in self._done:
                self.copy(name)

    def finish(
        self,
        extra_json: Mapping[str, Any] | None = None,
        *,
        extra_files: Mapping[str, str | bytes] | None = None,
        side_files: Mapping[str, Path] | None = None,
        library: str = "transformers",
    ) -> None:
        """Add everything besides weights, and give the directory its name.

        Args:
            extra_json: Further entries of ``curvkern.json``; NaN and infinity become null.
            extra_files: Plain file name to contents (text is stored as UTF-8).
            side_files: Files to copy, by path in the output; default: those beside ``like``.
            library: What loads the output, for the model card.

        Raises:
            CheckpointError: A tensor was not written, an entry is not JSON, an extra file has the name
                of another one, a file to copy cannot be read, an input changed, or a full disk.
        """
        missing = [name for name in self.names if name not in self._done]
        if missing:
            raise CheckpointError(f"{self.target}: not written: {listed(missing)}")
        side_files = self._like.side_files() if side_files is None else side_files
        own = {"README.md": model_card(self.target, self._recipe, self._sources, library).encode()}
        if self._like.indexed:
            own[_INDEX] = as_json(self._layout.index())
        taken = {*self._layout.heads, *side_files, *own, RECORD, STATE}
        extra = {name: _extra_file(self.target, name, text, taken) for name, text in (extra_files or {}).items()}
        files = taken - {STATE} | {*extra}
        record = as_json(describe(self._signature, self._sources, files, plain(extra_json or {})))
        with self._disk("writing the last files"):
            for name, path in side_files.items():
                self._stage.write(name, self._side_file(name, path))
            for name, contents in {**own, **extra, RECORD: record}.items():
                self._stage.write(name, contents)
            self._stage.publish()
        self._pool.shutdown()
        self._finished = True

    def abort(self) -> None:
        """Give up: ``OUT`` stays as it was; ``OUT.partial`` is kept only for a run to resume."""
        with suppress(OSError, CheckpointError):
            self._await()
        self._pool.shutdown()
        with suppress(OSError):
            self._flush.wait()
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        if self._resume:
            self._stage.release()
        else:
            self._stage.discard()

    def _reserve(self) -> None:
        """Check the free space, then take it and write the headers."""
        directory, sizes = self._stage.directory, self._layout.sizes
        held = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
        needed = sum(sizes.values()) - held
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise CheckpointError(
                f"{self.target}: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free on its disk"
            )
        for file in list(self._left):
            with self._disk(f"reserving room for {file}"):
                fd = self._descriptor(file)
                _allocate(fd, sizes[file])
                _write_at(fd, memoryview(self._layout.heads[file]), 0)
                if self._left[file]:
                    os.close(self._open.pop(file))
                else:
                    self._complete(file)

    def _put(self, spec: TensorSpec, blocks: Iterable[memoryview]) -> None:
        if spec.name in self._done:
            raise CheckpointError(f"{self.target}: {spec.name} is written already")
        self._await()
        fd = self._descriptor(spec.file)
        self._ahead = self._pool.submit(self._write, fd, spec, blocks)
        self._done.add(spec.name)
        self._left[spec.file].remove(spec.name)
        if not self._left[spec.file]:
            self._await()
            self._complete(spec.file)

    def _write(self, fd: int, spec: TensorSpec, blocks: Iterable[memoryview]) -> None:
        """On a thread of its own, while the caller makes the next tensor."""
        offset = spec.offset
        with span(spec.name, "write", bytes=spec.nbytes), self._disk(f"writing {spec.name} to {spec.file}"):
            for block in blocks:
                offset = _write_at(fd, block, offset)
            self._flush.wrote(fd, spec.nbytes)

    def _await(self) -> None:
        """Wait for the tensor that is being written; what went wrong with it is raised here."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.result()

    def _complete(self, file: str) -> None:
        """Note that a file is whole: of inputs that are what they were, and on the disk."""
        for source in self._inputs:
            source.require_unchanged()
        with span(file, "write", bytes=0), self._disk(f"bringing {file} onto the disk"):
            self._flush.wait()
            os.fsync(self._open[file])
            os.close(self._open.pop(file))
            del self._left[file]
            self._stage.record(file)

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            path = self._stage.directory / file
            # The umask applies: other users may read the result wherever they may read its siblings.
            self._open[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._open[file]

    def _side_file(self, name: str, path: Path) -> bytes:
        if name != "config.json" or self._dtype is None:
            return contents(path)
        config = read_json(path)
        stored = str(self._dtype).removeprefix("torch.")
        for part in (config, config.get("text_config") or {}):
            part.update({key: stored for key in ("dtype", "torch_dtype") if key in part})
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

    def _disk(self, doing: str) -> AbstractContextManager[None]:
        again = "; finished shards are kept for resume: put it right and resume" if self._resume else "; run again"
        return on_disk(self.target, doing, again)


def _extra_file(target: Path, name: str, contents: str | bytes, taken: Set[str]) -> bytes:
    if name in taken or Path(name).name != name:
        raise CheckpointError(f"{target}: extra file {name!r}: wanted a plain name that no other file has")
    return contents.encode() if isinstance(contents, str) else contents


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_ALLOCATE:
            raise
        os.ftruncate(fd, size)


def _write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all of ``data`` at ``offset`` and return where it ends."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    return offset
