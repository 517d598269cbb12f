"""Which files a checkpoint consists of: a directory, one file, or a repository in the hub cache."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from curvkern.checkpoint.error import CheckpointError, listed

TEMPLATES = "additional_chat_templates"
PICKLE = ".bin"
SAFETENSORS = ".safetensors"
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "*.model",
    "chat_template*",
    f"{TEMPLATES}/*",
)
_MODEL = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
# Code of a model's own imports helper modules by any name.
_CODE = ("*.py",)
_FOUND_BESIDE = (
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*model*.bin",
    "*model*.bin.index.json",
    "training_args.bin",
    "README.md",
    ".gitattributes",
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.gguf", "*.msgpack")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint.

    Attributes:
        paths: The files, in name order.
        index: Tensor name to plain file name where the checkpoint has an index.
    """

    paths: tuple[Path, ...]
    index: dict[str, str] | None


def resolve(path: str | Path) -> Path:
    """Return the local path of ``path``: itself, or the cached snapshot of a hub id.

    A hub id is ``org/name`` or ``org/name@revision``; nothing is downloaded.

    Raises:
        CheckpointError: Neither a path nor a cached repository.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    match = _HUB_ID.fullmatch(str(path))
    if match is None:
        raise CheckpointError(f"{path}: no such file or directory")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(match["id"], revision=match["revision"], local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no such file or directory, and not in the local Hugging Face cache "
            f"(to fetch it: hf download {match['id']})"
        ) from error
    return Path(found)


def find_weights(root: Path, *, stem: str, allow_pickle: bool) -> WeightFiles:
    """List the weight files under ``root``; safetensors win over pickles, one file over shards.

    Args:
        root: A directory, or one weight file.
        stem: ``model`` for a checkpoint, ``adapter_model`` for an adapter.
        allow_pickle: Whether ``.bin`` files may be taken.

    Raises:
        CheckpointError: No weights, only pickles, or an index that is broken or unsafe.
    """
    if not root.is_dir():
        if root.suffix == PICKLE and not allow_pickle:
            raise CheckpointError(_pickle_refusal(root))
        return WeightFiles((root,), None)
    pickled = stem if stem.startswith("adapter") else f"pytorch_{stem}"
    for name in (f"{stem}{SAFETENSORS}", f"{pickled}{PICKLE}"):
        single, index = root / name, root / f"{name}.index.json"
        # A dangling link is a file that the cache lost, not a file that was never there.
        if not (single.exists() or single.is_symlink() or (stem == "model" and index.exists())):
            continue
        if name.endswith(PICKLE) and not allow_pickle:
            raise CheckpointError(_pickle_refusal(root))
        if single.exists() or single.is_symlink():
            return WeightFiles((single,), None)
        weight_map = _read_index(index, single.suffix)
        return WeightFiles(tuple(root / f for f in sorted(set(weight_map.values()))), weight_map)
    if (root / "adapter_config.json").exists():
        raise CheckpointError(f"{root}: a LoRA adapter, not a whole checkpoint")
    present = listed(sorted(p.name for p in root.iterdir())) or "nothing"
    raise CheckpointError(f"{root}: no {stem}{SAFETENSORS} and no index of shards; holds {present}")


def side_files(directory: Path, *, model: bool = True, tokenizer: bool = True) -> dict[str, Path]:
    """List what belongs to a model besides weights, by path relative to ``directory``.

    Args:
        directory: Where to look.
        model: Include configurations, model code and licences.
        tokenizer: Include tokenizer files and chat templates.
    """
    patterns = (_MODEL + _CODE if model else ()) + (_TOKENIZER if tokenizer else ())
    candidates = [*directory.glob("*"), *directory.glob(f"{TEMPLATES}/*")]
    relative = {p.relative_to(directory).as_posix(): p for p in candidates if p.is_file()}
    return {
        name: path
        for name, path in sorted(relative.items())
        if any(fnmatch(name, p) for p in patterns) and not any(fnmatch(name, p) for p in _WEIGHTS)
    }


def expected(name: str) -> bool:
    """Judge whether a file of this name, a path in a checkpoint's directory, is one that checkpoints have."""
    return any(fnmatch(name, pattern) for pattern in (*_MODEL, *_TOKENIZER, *_FOUND_BESIDE))


def source_name(path: Path) -> str:
    """Return what to call an input: ``org/name@revision`` in the hub cache, else its file name."""
    place = path.absolute()
    for snapshot in (place, place.parent, place.resolve()):
        repository = snapshot.parent.parent.name
        if snapshot.parent.name == "snapshots" and repository.startswith("models--"):
            return f"{repository.removeprefix('models--').replace('--', '/')}@{snapshot.name}"
    return path.resolve().name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: Unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, wanted a JSON object")
    return value


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map")
    for tensor, file in weight_map.items():
        if not _is_plain(file) or not file.endswith(suffix):
            raise CheckpointError(
                f"{path}: {tensor} is said to be in {file!r}; wanted the plain name of a "
                f"{suffix} file in the same directory"
            )
    return weight_map


def _is_plain(file: object) -> bool:
    """Judge the name, not what it links to: entries of the hub cache link out of their directory."""
    return isinstance(file, str) and re.fullmatch(r"[^./\\\0][^/\\\0]*", file) is not None


def _pickle_refusal(root: Path) -> str:
    return (
        f"{root}: only pickled weights (.bin), which are not read. Convert them to safetensors: load the "
        "model with transformers and save_pretrained() it to another directory"
    )
