"""Which of a checkpoint's tensors each parameter of a model is made of, by the mapping that transformers uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from curvkern.checkpoint import Weights
from curvkern.layerwise.error import LayerwiseError

_SHOWN = 6


@dataclass
class Fill:
    """What some parameters are made of; most often one of one.

    Attributes:
        targets: names of parameters and buffers, as the model has them.
        sources: (pattern, name) of the checkpoint's tensors: the pattern says what part the tensor plays.
        converter: transformers' operations (experts stacked, one matrix cut in three), or None.
    """

    targets: tuple[str, ...]
    sources: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    converter: Any = None

    def make(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, of the checkpoint's tensors by name."""
        if self.converter is None:
            return {self.targets[0]: tensors[self.sources[0][1]]}
        converter = deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.targets[0], name, pattern, tensors[name])
        made: dict[str, Any] = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def plan_fills(model: Any, source: Weights) -> list[Fill]:
    """Match names and shapes; no tensor is read.

    Args:
        model: without weights.
        source: the checkpoint.

    Raises:
        LayerwiseError: transformers is older than 5; parameters that no tensor is for; tensors that are for no
            parameter; shapes that differ.
    """
    state: dict[str, Tensor] = model.state_dict()
    fills: dict[str, Fill] = {}
    strange: list[str] = []
    for name, (target, pattern, converter) in _targets(model, source.names, state).items():
        others = converter.target_patterns if converter is not None else [""]
        targets = tuple(target.replace(others[0], other) if other else target for other in others)
        if not set(targets) <= state.keys():
            strange.append(name)
            continue
        fills.setdefault(target, Fill(targets, converter=converter)).sources.append((pattern or name, name))
    _refuse_strange(model, source, strange, state)
    _refuse_missing(model, source, {name for fill in fills.values() for name in fill.targets}, state)
    for fill in fills.values():
        _check_shape(source, fill, state)
    return list(fills.values())


def wanted_dtypes(model: Any, state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Dtype of every parameter: the skeleton's, but float32 for those that the model keeps so."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    kept = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in plan.items()}
    return {
        name: next((dtype for pattern, dtype in kept.items() if pattern.search(name)), tensor.dtype)
        for name, tensor in state.items()
    }


def tied_groups(model: Any) -> Iterable[set[str]]:
    """Names of parameters that the configuration says are one."""
    groups: dict[str, set[str]] = {}
    for target, origin in model.all_tied_weights_keys.items():
        groups.setdefault(origin, {origin}).add(target)
    return groups.values()


def _targets(
    model: Any, names: Iterable[str], state: Mapping[str, Tensor]
) -> dict[str, tuple[str, str | None, Any | None]]:
    """Checkpoint name -> (name of the first parameter it goes into, pattern it matched, converter)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise LayerwiseError("layerwise: needs transformers 5 or newer, whose mapping of names it uses") from error
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, tuple[str, str | None, Any | None]] = {}
    # Converters stack experts in the order they are given them: 2 before 10.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(state))
        if target not in state and name in state:
            target, pattern = name, None
        found[name] = (target, pattern, by_pattern[pattern] if pattern is not None else None)
    return found


def _refuse_strange(model: Any, source: Weights, strange: list[str], state: Mapping[str, Tensor]) -> None:
    # Older checkpoints hold buffers that models now make by themselves.
    ignored = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]
    unknown = [name for name in strange if not any(re.search(pattern, name) for pattern in ignored)]
    if unknown:
        close = get_close_matches(unknown[0], state, n=1)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise LayerwiseError(
            f"{source.path}: {len(unknown)} tensors are for no parameter of {type(model).__name__}: "
            f"{', '.join(unknown[:_SHOWN])}{hint}. Is config.json that of these weights?"
        )


def _refuse_missing(model: Any, source: Weights, filled: set[str], state: Mapping[str, Tensor]) -> None:
    there = filled.union(*(group for group in tied_groups(model) if group & filled))
    ignored: list[str] = list(model._keys_to_ignore_on_load_missing or ())
    # What may be missing are buffers, which the skeleton has values for.
    excused = {n for n, t in state.items() if not t.is_meta and any(re.search(p, n) for p in ignored)}
    lost = [name for name in state if name not in there | excused]
    if lost:
        raise LayerwiseError(
            f"{source.path}: no tensor for {len(lost)} parameters of {type(model).__name__}: "
            f"{', '.join(lost[:_SHOWN])}. The checkpoint is not whole, or not one of this architecture."
        )


def _check_shape(source: Weights, fill: Fill, state: Mapping[str, Tensor]) -> None:
    """One tensor for one parameter has its shape; what is stacked or cut is checked when it is made."""
    if fill.converter is not None:
        return
    target, (_, name) = fill.targets[0], fill.sources[0]
    got, wanted = source.spec(name).shape, tuple(state[target].shape)
    if got != wanted:
        raise LayerwiseError(
            f"{source.path}: {name} is {list(got)}, but {target} takes {list(wanted)}. Is config.json that of these "
            "weights?"
        )
