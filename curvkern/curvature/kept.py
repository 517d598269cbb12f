"""Statistics in files: written as they become complete, read one tensor at a time when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvkern.curvature.hidden import CurvatureError

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Kept(Mapping[str, Tensor]):
    """The tensors of one quantity in a file that `Statistics.save` or a `Keeper` wrote, by parameter."""

    def __init__(self, path: Path, keys: Mapping[str, str]) -> None:
        """Read nothing yet.

        Args:
            path: of the file.
            keys: parameter -> name of the tensor in the file.
        """
        self.path = path
        self._keys = keys

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, to the CPU."""
        from safetensors import safe_open

        key = self._keys[name]
        # Opened each time: pages of a file that stays mapped stay in memory.
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(key)

    def read(self) -> dict[str, Tensor]:
        """Read all; what several parameters share stays shared."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in set(self._keys.values())}
        return {name: tensors[key] for name, key in self._keys.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Keeper:
    """Writes sums as they become complete, and lets go of them: one file for each quantity.

    Files are those of `Statistics.save`. What they hold is told last, in a header that has its room from the start.
    """

    def __init__(self, directory: str | Path) -> None:
        """Write nothing yet.

        Args:
            directory: that is there; files are named ``<quantity>.safetensors``.
        """
        self._directory = Path(directory)
        self._files: dict[str, _File] = {}

    def take(self, found: Mapping[str, dict[str, Tensor]], parameters: Iterable[str], counts: object) -> None:
        """Write what there is of each quantity, by parameter, and empty it.

        Args:
            found: quantity -> parameter -> sums; of a quantity no parameter comes twice.
            parameters: names of all parameters of the model, for which there has to be room.
            counts: are told in the end, to `finish`.

        Raises:
            CurvatureError: a file cannot be written.
        """
        try:
            for quantity, of in found.items():
                if of and quantity not in self._files:
                    room = sum(len(name) + 64 for name in parameters)
                    self._files[quantity] = _File(self._directory / f"{quantity}.safetensors", quantity, room)
                if of:
                    self._files[quantity].put(of)
                    of.clear()
        except OSError as error:
            raise CurvatureError(f"{self._directory}: cannot keep statistics there: {error.strerror}") from error

    def found(self) -> dict[str, Mapping[str, Tensor]]:
        """What was written; to be read once `finish` has been called."""
        return {quantity: Kept(file.path, file.keys) for quantity, file in self._files.items()}

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write what the files hold.

        Args:
            about: entries of the metadata, see `Statistics`.
        """
        for file in self._files.values():
            file.finish(about)


class _File:
    def __init__(self, path: Path, quantity: str, names: int) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        self._quantity = quantity
        self._entries: dict[str, dict[str, Any]] = {}
        # A parameter is named four times at most, and has 256 bytes for its shape and offsets; all else is short.
        self._room = -(-(4 * names + (1 << 16)) // 8) * 8  # a multiple of 8, so that tensors are aligned
        self._end = 0
        path.write_bytes(b"")

    def put(self, of: Mapping[str, Tensor]) -> None:
        first: dict[int, str] = {}
        with self.path.open("r+b") as file:
            file.seek(8 + self._room + self._end)
            for name, tensor in of.items():
                key = self.keys[name] = first.setdefault(tensor.data_ptr(), f"{self._quantity}/{name}")
                if key not in self._entries:
                    file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                    offsets = [self._end, self._end + tensor.nbytes]
                    self._entries[key] = {
                        "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets,
                    }  # fmt: skip
                    self._end = offsets[1]

    def finish(self, about: Mapping[str, Any]) -> None:
        full = {name: f"{self._quantity}/{name}" for name in self.keys}
        shared = {full[name]: key for name, key in self.keys.items() if key != full[name]}
        text = json.dumps({**about, "shared": shared})
        header = json.dumps({"__metadata__": {"curvkern": text}, **self._entries}).encode()
        if len(header) > self._room:
            raise CurvatureError(f"{self.path}: its header of {len(header)} bytes has no room in {self._room}")
        with self.path.open("r+b") as file:
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
