"""What the files of a LoRA adapter in PEFT's format mean: which weights change, where, how much.

LoRA (Hu et al., arXiv 2106.09685, section 4.1) writes the tuned weight as W + s B A with
s = alpha / r; rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732) uses s = alpha / sqrt(r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkern.checkpoint.error import CheckpointError
from curvkern.checkpoint.read import Checkpoint

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# Settings under which the tuned weight is W + s B A. Any other that is set is refused by its name:
# a feature this reader does not know must not pass for plain LoRA.
_PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
# PiSSA, OLoRA, CorDA, LoftQ and others rewrite W when the adapter is loaded; these do not.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Place:
    """Where an adapter keeps a change: the tensors' names, and whether they hold the transpose."""

    b_key: str
    a_key: str
    transposed: bool
    scale: float


def refuse_features(root: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` with the name of whatever makes an adapter more than W + s B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{root}: peft_type {kind} is not supported, only LORA")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{root}: bias={config['bias']!r} (tuned biases) is not supported")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise CheckpointError(
            f"{root}: init_lora_weights={init!r} changes the base weights when PEFT loads it; "
            "convert it to plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_"
            "conversion=...), or merge it with PEFT first"
        )
    for feature, value in config.items():
        if value and feature not in _PLAIN:
            raise CheckpointError(
                f"{root}: {feature} is not supported (only plain LoRA); merge the adapter with "
                "PEFT first and pass the merged checkpoint"
            )


def find_changes(weights: Checkpoint, config: Mapping[str, Any]) -> tuple[dict[str, Place], dict[str, str]]:
    """Find what an adapter changes, by checkpoint name.

    Args:
        weights: The adapter's tensors.
        config: The contents of ``adapter_config.json``.

    Returns:
        The factor pairs, and the name of each tensor that replaces one whole.

    Raises:
        CheckpointError: Unknown tensors, half a pair, convolutions, contradicting ranks.
    """
    places: dict[str, Place] = {}
    whole: dict[str, str] = {}
    for key in weights.names:
        if not key.startswith(_PREFIX):
            raise CheckpointError(f"{weights.path}: {key}: wanted a name that starts with {_PREFIX}")
        name = key[len(_PREFIX) :]
        module, kind = _split(name)
        if kind == "whole":
            whole[name.replace(".base_layer.", ".")] = key
        elif kind is None:
            raise CheckpointError(f"{weights.path}: {key} is not a tensor of plain LoRA")
        else:
            embedding = "embedding" in kind
            a_key, b_key = (key.replace(kind, kind[:-1] + side) for side in "AB")
            rank = _rank(weights, a_key, b_key)
            # An embedding's change is (B A)^T, and so is that of a weight stored [in, out].
            transposed = embedding or bool(config.get("fan_in_fan_out"))
            scale = _scale(weights.path, config, module, rank)
            places[f"{module}.weight"] = Place(b_key, a_key, transposed, scale)
    return places, whole


def _split(name: str) -> tuple[str, str | None]:
    """Return the module and ``lora_A``, ``lora_embedding_B`` ..., ``whole``, or None if unknown."""
    match = re.fullmatch(r"(.+)\.(?:(lora_[AB])\.weight|(lora_embedding_[AB]))", name)
    if match:
        return match[1], match[2] or match[3]
    known = "lora_" not in name and "trainable_tokens" not in name
    return name, "whole" if known else None


def _rank(weights: Checkpoint, a_key: str, b_key: str) -> int:
    for key, partner in ((a_key, b_key), (b_key, a_key)):
        if key not in weights:
            raise CheckpointError(f"{weights.path}: {partner} has no {key} beside it")
    a, b = weights.spec(a_key).shape, weights.spec(b_key).shape
    if len(a) != 2 or len(b) != 2:
        raise CheckpointError(
            f"{weights.path}: {a_key} {list(a)} and {b_key} {list(b)}: only matrices are supported, not convolutions"
        )
    if a[0] != b[1] or a[0] == 0:
        raise CheckpointError(f"{weights.path}: ranks differ: {a_key} {list(a)}, {b_key} {list(b)}")
    return a[0]


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    declared = _setting(path, config, "rank_pattern", "r", module)
    alpha = _setting(path, config, "alpha_pattern", "lora_alpha", module)
    if declared != rank:
        raise CheckpointError(f"{path}: {module}: {CONFIG} says rank {declared}, the tensors have rank {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _setting(path: Path, config: Mapping[str, Any], pattern: str, default: str, module: str) -> float:
    """Look a module up as PEFT does: the first pattern that matches the end of its name wins."""
    value = config.get(default, 8)
    for key, special in (config.get(pattern) or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise CheckpointError(f"{path}: {CONFIG}: {pattern}: {key!r}: {error}") from error
        if matched:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {CONFIG}: {default} for {module} is {value!r}, not a number")
    return value
