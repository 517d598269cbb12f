"""Statistics that are handed to a function as they become complete, and kept nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from curvkern.curvature.statistics import Choices, Counts, Statistics


class Handed:
    """What `Keeper` is for files: takes sums as they become complete, and lets go of them."""

    def __init__(self, choices: Choices, take: Callable[[Statistics], object]) -> None:
        """Hand on nothing yet.

        Args:
            choices: of what is to come.
            take: is called with the statistics of the parameters that are complete, of no parameter twice.
        """
        self._choices = choices
        self._take = take

    def take(self, found: Mapping[str, dict[str, Tensor]], parameters: Iterable[str], counts: Counts) -> None:
        """Hand on what there is of each quantity, by parameter, and empty it; arguments as those of `Keeper.take`."""
        if any(found.values()):
            self._take(Statistics(self._choices, counts, found))
        for of in found.values():
            of.clear()

    def found(self) -> dict[str, Mapping[str, Tensor]]:
        """Nothing is left."""
        return {}

    def finish(self, about: Mapping[str, Any]) -> None:
        """Do nothing."""
