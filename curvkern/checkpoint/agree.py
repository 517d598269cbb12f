"""Whether several checkpoints are of one model, told from headers, configurations and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from curvkern.checkpoint.error import CheckpointError, listed
from curvkern.checkpoint.format import TensorSpec
from curvkern.checkpoint.read import Checkpoint
from curvkern.checkpoint.tuned import TunedView

Source = Checkpoint | TunedView

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts",
    "hidden_act",
    "head_dim",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
)
_HEADS = ("lm_head.weight", "embed_out.weight")
_BUFFERS = (".inv_freq", ".masked_bias", ".position_ids")
_MASKS = (".attn.bias", ".attention.bias")


def check_agreement(sources: Mapping[str, Source], *, vocabulary: bool = True) -> dict[str, str]:
    """Refuse checkpoints that cannot be compared tensor by tensor; reads no tensor.

    Args:
        sources: Role ("aligned", "tuned", ...) to checkpoint.
        vocabulary: Also compare the tokenizers' token ids.

    Returns:
        Tensors to leave out of the comparison, with the reason: buffers that a model recomputes, and
        an output head that one side has and another ties to its embedding.

    Raises:
        CheckpointError: Different architectures, missing or extra tensors, other shapes, quantised
            or non-float weights, different vocabularies. The message names the tensor and both
            sides.
    """
    for role, source in sources.items():
        _refuse_quantised(role, source)
    _check_configs({role: source.config for role, source in sources.items()})
    skipped = _check_names(sources)
    _check_shapes(sources, skipped)
    if vocabulary:
        _check_vocabularies(sources)
    return skipped


def _refuse_quantised(role: str, source: Source) -> None:
    settings = source.config.get("quantization_config")
    if settings:
        how = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise CheckpointError(f"{role} ({source.path}) is quantised ({how}); pass the weights it was made from")
    for spec in map(source.spec, source.names):
        if spec.dtype not in _FLOATS and not _is_buffer(spec):
            raise CheckpointError(
                f"{spec.name} in {role} ({source.path}) is {spec.dtype}: quantised or non-float "
                "weights cannot be compared; pass the weights they were made from"
            )


def _check_configs(configs: Mapping[str, Mapping[str, Any]]) -> None:
    for part in (None, "text_config"):
        parts = {role: c if part is None else c.get(part) or {} for role, c in configs.items()}
        for key in _ARCHITECTURE:
            values = {role: c[key] for role, c in parts.items() if c.get(key) is not None}
            if len(set(map(str, values.values()))) > 1:
                told = ", ".join(f"{role} {value}" for role, value in values.items())
                raise CheckpointError(f"config.json: {key} differs: {told}")


def _check_names(sources: Mapping[str, Source]) -> dict[str, str]:
    skipped: dict[str, str] = {}
    lacking: dict[tuple[str, str], list[str]] = {}
    everything = {name: role for role, source in sources.items() for name in source.names}
    names = {role: set(source.names) for role, source in sources.items()}
    for name, owner in everything.items():
        absent = [role for role in sources if name not in names[role]]
        if _is_buffer(sources[owner].spec(name)):
            skipped[name] = "a buffer, which the model recomputes"
        elif absent and name.endswith(_HEADS) and all(_may_tie(sources[role]) for role in absent):
            skipped[name] = f"tied to the embedding in {' and '.join(absent)}"
        else:
            for role in absent:
                lacking.setdefault((role, owner), []).append(name)
    if lacking:
        told = [f"{role} lacks, and {owner} has: {listed(n)}" for (role, owner), n in lacking.items()]
        raise CheckpointError("the checkpoints hold different tensors: " + "; ".join(told))
    return skipped


def _check_shapes(sources: Mapping[str, Source], skipped: Mapping[str, str]) -> None:
    first = next(iter(sources.values()))
    differing: list[str] = []
    for name in first.names:
        if name in skipped:
            continue
        specs = {role: source.spec(name) for role, source in sources.items()}
        if len({spec.shape for spec in specs.values()}) > 1:
            told = ", ".join(f"{role} {list(spec.shape)}" for role, spec in specs.items())
            differing.append(f"{name}: {told}{_vocabulary_hint(sources, specs)}")
    if differing:
        raise CheckpointError("shapes differ: " + listed(differing))


def _vocabulary_hint(sources: Mapping[str, Source], specs: Mapping[str, TensorSpec]) -> str:
    rows = {role: spec.shape[:1] for role, spec in specs.items()}
    sizes = {role: (source.config.get("vocab_size"),) for role, source in sources.items()}
    return " (the vocabularies differ in size)" if rows == sizes else ""


def _is_buffer(spec: TensorSpec) -> bool:
    # GPT-2 keeps its causal mask [1, 1, n, n] under a name that is a bias elsewhere.
    mask = spec.name.endswith(_MASKS) and len(spec.shape) == 4
    return mask or spec.name.endswith(_BUFFERS)


def _may_tie(source: Source) -> bool:
    return source.config.get("tie_word_embeddings") is not False


def _check_vocabularies(sources: Mapping[str, Source]) -> None:
    files = {role: source.side_files().get("tokenizer.json") for role, source in sources.items()}
    known = [(role, path) for role, path in files.items() if path is not None]
    for (role, path), (other_role, other_path) in pairwise(known):
        if path.read_bytes() != other_path.read_bytes():
            _compare_tokens(role, _token_ids(path), other_role, _token_ids(other_path))


def _compare_tokens(role: str, ids: dict[str, int], other_role: str, other: dict[str, int]) -> None:
    """Tokens that only one side has may fill ids the other leaves free; nothing else may differ."""
    taken = {number: token for token, number in other.items()}
    for token, number in ids.items():
        elsewhere = other.get(token)
        if elsewhere != number and (elsewhere is not None or number in taken):
            found = f"it as id {elsewhere}" if elsewhere is not None else f"{taken[number]!r} there"
            raise CheckpointError(
                f"the vocabularies differ: {role} has {token!r} as id {number}, {other_role} has "
                f"{found}. Their embeddings cannot be compared; if only a file is wrong, put one "
                "tokenizer.json into both directories"
            )


def _token_ids(path: Path) -> dict[str, int]:
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        return vocabulary | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: not a tokenizer file: {error!r}") from error
