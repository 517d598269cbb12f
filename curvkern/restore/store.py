"""Statistics of a model that a method asks for: found in a directory that runs share, or estimated."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from curvkern.restore.budget import Placement, size
from curvkern.restore.recipe import Recipe
from curvkern.restore.scope import RestoreError

if TYPE_CHECKING:
    from curvkern.curvature import Choices, Footprint, Statistics, Text
    from curvkern.methods import Need

#: What is asked of `curvature.estimate` to get a quantity that it does not take by itself.
_COMES_WITH = {"input_gram": "kfac", "output_gram": "kfac", "input_basis": "ekfac", "output_basis": "ekfac"}


class Store:
    """A directory of statistics that several runs share; a file's name tells model, data and loss."""

    def __init__(self, recipe: Recipe, names: Sequence[str], scratch: Path, tell: Callable[[str], None]) -> None:
        """Make the recipe's directory, if it has one.

        Args:
            recipe: its ``statistics`` directory and patterns.
            names: modules that have to be measured.
            scratch: directory for what does not fit into memory, if the recipe has none; made if it is needed.
            tell: takes lines for the report.

        Raises:
            RestoreError: the recipe's directory cannot be made.
        """
        self._recipe = recipe
        self._names = frozenset(names)
        self._tell = tell
        self._lasting = recipe.statistics is not None
        self._directory = scratch if recipe.statistics is None else recipe.statistics.expanduser()
        if self._lasting:
            self._make_directory()

    def there(self, needs: Sequence[Need], model: Any, texts: Sequence[Text]) -> dict[Need, Statistics]:
        """Those statistics of one model on one set of data under one loss that are in the directory.

        Args:
            needs: of one model, data and loss.
            model: as from `budget.opened`.
            texts: the data.
        """
        from curvkern.curvature.texts import fingerprint as data_fingerprint

        data = data_fingerprint(texts)
        if not any(self._like(need, data, "*") for need in needs):
            return {}
        choices = _choices(model, needs[0].loss)
        there = {need: self._load(need, choices, data) for need in needs}
        return {need: held for need, held in there.items() if held is not None}

    def estimated(
        self,
        needs: Sequence[Need],
        model: Any,
        texts: Sequence[Text],
        where: Placement,
        needed: Footprint,
        advance: Callable[[int, int], None],
        complete: Callable[[Statistics], object] | None = None,
    ) -> dict[Need, Statistics]:
        """Statistics like those of `there`, estimated.

        Args:
            needs: of one model, data and loss.
            model: as from `budget.opened`.
            texts: the data.
            where: what is estimated is kept.
            needed: what all statistics of this model take.
            advance: told of samples done and samples in all.
            complete: takes the statistics of each layer when its backward ends; then they are not kept, and nothing is
                returned.

        Raises:
            RestoreError: there is no directory, or no room in it.
            CurvatureError: as `curvature.estimate`.
        """
        from curvkern.curvature import Statistics, estimate
        from curvkern.curvature.texts import fingerprint as data_fingerprint

        in_files = where.statistics_in_files and complete is None
        if in_files:
            self._require_room(needed.statistics)
        data = data_fingerprint(texts)
        with ExitStack() as stack:
            directory: str | None = None
            if where.hidden_in_files or in_files:
                self._make_directory()
                directory = stack.enter_context(TemporaryDirectory(prefix="unfinished-", dir=self._directory))
            estimated = estimate(
                model, texts, quantity=asked_of(needs), loss=needs[0].loss, tell=advance,
                include=self._recipe.include, exclude=self._recipe.exclude,
                spill=directory if where.hidden_in_files else None,
                keep=directory if in_files else complete,
            )  # fmt: skip
            if complete is not None:
                return {}
            found: dict[Need, Statistics] = {}
            for need in needs:
                path = self._path(need, estimated.choices, data)
                found[need] = replace(estimated, sums={need.quantity: estimated[need.quantity]})
                if directory is not None and in_files:
                    (Path(directory) / f"{need.quantity}.safetensors").replace(path)
                    found[need] = Statistics.open(path)
                elif self._lasting:
                    found[need].save(path)
        return found

    def _load(self, need: Need, choices: Choices, data: str) -> Statistics | None:
        from curvkern.curvature import Statistics

        path = self._path(need, choices, data)
        if not path.is_file():
            return None
        held = Statistics.open(path)
        fits = held.choices == choices and held.counts.data == (data,) and math.isfinite(held.counts.loss)
        if not fits or not self._names <= set(held.sums.get(need.quantity, {})):
            return None
        self._tell(f"{need.quantity} of {need.data} data at {need.at}: from {path}")
        return held

    def _path(self, need: Need, choices: Choices, data: str) -> Path:
        key = zlib.crc32(repr(sorted(asdict(choices).items())).encode())
        return self._directory / _file_name(need, data, f"{key:08x}")

    def _like(self, need: Need, data: str, key: str) -> bool:
        return any(self._directory.glob(_file_name(need, data, key)))

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RestoreError(f"restore: statistics={self._directory}: {error.strerror}.") from None

    def _require_room(self, nbytes: int) -> None:
        self._make_directory()
        free = disk_usage(self._directory).free
        if free < nbytes:
            raise RestoreError(
                f"restore: statistics take up to {size(nbytes)}, but {size(free)} are free at {self._directory}; pass "
                "statistics=... (--statistics), a directory with more room."
            )


def _file_name(need: Need, data: str, key: str) -> str:
    return f"{need.data}-at-{need.at}-{need.quantity}-{data}-{key}.safetensors"


def _choices(model: Any, loss: str) -> Choices:
    """The choices of `curvature.estimate` with its defaults; of a model on disk, for one read of its weights."""
    from curvkern.curvature import Choices, fingerprint_of

    return Choices(model=fingerprint_of(model), loss=loss, dtype=str(model.dtype).removeprefix("torch."))


def asked_of(needs: Iterable[Need]) -> list[str]:
    """What `curvature.estimate` is asked for."""
    from curvkern.curvature.sums import QUANTITIES

    known = frozenset[str](QUANTITIES)
    return sorted({q if q in known else _COMES_WITH.get(q, q) for q in (need.quantity for need in needs)})
