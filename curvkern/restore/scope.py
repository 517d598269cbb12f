"""Which tensors of a checkpoint a restoration may edit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvkern.methods import Method
    from curvkern.restore.recipe import Recipe


class RestoreError(RuntimeError):
    """The restoration cannot be done as asked."""


def select_modules(
    shapes: Mapping[str, tuple[int, ...]],
    method: type[Method] | Method,
    recipe: Recipe,
    config: Mapping[str, Any] | None = None,
) -> list[str]:
    """Names of the weights to restore: matrices inside decoder layers, and their biases if the method takes them.

    Args:
        shapes: every tensor of the checkpoint.
        method: says whether biases are wanted, and whether it matters which side of a weight is the output.
        recipe: its ``include`` and ``exclude`` patterns.
        config: of the checkpoint. Of several stacks of layers (a vision tower beside the language model) the one with
            as many as it says is the decoder.

    Raises:
        RestoreError: a pattern matches nothing that can be restored, nothing is left, or the weights are [in, out].
    """
    config = config or {}
    if method.oriented and config.get("model_type") in _TRANSPOSED:
        raise RestoreError(
            f"restore: {method.name} needs weights [out, in]; {config['model_type']} models keep theirs [in, out]."
        )
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and layer_of(name) is not None]
    matrices = _of_the_decoder(matrices, config)
    chosen = set(matrices)
    if method.biases:
        chosen |= {name[: -len("weight")] + "bias" for name in matrices if name.endswith(".weight")}
    names = [name for name in shapes if name in chosen]
    for patterns, keep in ((recipe.include, True), (recipe.exclude, False)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in shapes if name in chosen):
                which = "include" if keep else "exclude"
                one = next(iter(chosen), "none")
                raise RestoreError(
                    f"restore: {which} pattern {pattern!r} matches no linear weight of a decoder layer; one is {one}."
                )
        if patterns:
            names = [name for name in names if any(fnmatchcase(name, p) for p in patterns) is keep]
    if not names:
        raise RestoreError("restore: no module is selected; loosen include and exclude.")
    return names


#: Model types of transformers whose linear modules are Conv1D: weights [in, out].
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


def _of_the_decoder(names: list[str], config: Mapping[str, Any]) -> list[str]:
    """Those of the stack with as many layers as the configuration has, if that tells one stack from others."""
    text = config.get("text_config") or config
    depth = text.get("num_hidden_layers", text.get("n_layer"))
    layers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        layers[re.split(r"(?:^|\.)\d+\.", name)[0]].add(layer_of(name) or 0)
    decoders = [prefix for prefix, numbers in layers.items() if len(numbers) == depth]
    return [name for name in names if name.startswith(f"{decoders[0]}.")] if len(decoders) == 1 else names


def layer_of(name: str) -> int | None:
    """The decoder layer's number: the first numeric part of the name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None
