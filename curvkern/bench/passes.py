"""The whole restoration pass on checkpoints made up for it: weight-only, against the disk; with a model, as it is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

import curvkern
from curvkern.bench.clock import Timing, clock_on, extra_memory, interleave
from curvkern.bench.machine import Machine
from curvkern.bench.results import Row

#: Llama's shape: hidden size, layers, vocabulary.
SHAPES = {"tiny": (64, 2, 256), "s": (1024, 6, 16384), "m": (2048, 16, 32768), "l": (4096, 32, 32768)}

_BLOCK = 16 << 20


def measure_passes(machine: Machine, size: str, seconds: float) -> Iterator[list[Row]]:
    """``merge``, checkpoint to checkpoint, against reading and writing the same bytes; ``gradient_rollback``, tiny.

    Args:
        machine: where edits are computed.
        size: of the merged model, a key of `SHAPES`.
        seconds: for each provider; at least three rounds.

    Raises:
        ValueError: no such size.
    """
    if size not in SHAPES:
        raise ValueError(f"bench: no pass of size {size!r}; there are {', '.join(SHAPES)}.")
    with TemporaryDirectory(prefix="curvkern-bench-") as name, _no_bars():
        root = Path(name)
        yield _merge(root / "merge", machine, size, seconds)
        yield _gradient_rollback(root / "rollback", machine)


@contextlib.contextmanager
def _no_bars() -> Generator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _merge(root: Path, machine: Machine, size: str, seconds: float) -> list[Row]:
    weights = _make_models(root, *SHAPES[size])
    inputs = sorted(path for name in ("aligned", "tuned") for path in (root / name).glob("*.safetensors"))
    moved = sum(path.stat().st_size for path in inputs) * 3 // 2  # two checkpoints in, one out

    def restore() -> None:
        curvkern.restore(
            root / "aligned", root / "tuned", out=root / "out", method="merge", device=machine.device,
            overwrite=True,
        )  # fmt: skip

    label = f"merge Llama {weights / 1e6:.1f} M"
    row = Row("restore", "bfloat16", label, "curvkern", "ours", bytes=moved)
    raw = Row("restore", "bfloat16", label, "read + write", "bound", bytes=moved)
    cpu = torch.device("cpu")  # the wall clock: a pass is over when its files are written
    calls: dict[str, Callable[[], None]] = {row.provider: restore, raw.provider: lambda: _read_and_write(inputs, root)}
    extra = {name: extra_memory(call, ((), {}), cpu) for name, call in calls.items()}
    error = _merge_error(root)
    if error > 0:
        return [replace(row, status="wrong", note=f"a weight is off by {error:.2g} of the largest", error=error)]
    times = interleave({name: clock_on(cpu, call) for name, call in calls.items()}, seconds, rounds=3)
    floor = Timing.of(times[raw.provider]).median * 1e6
    row, raw = (replace(r, floor=floor).timed(Timing.of(times[r.provider]), extra[r.provider]) for r in (row, raw))
    return [replace(row, error=error), raw]


def _read_and_write(inputs: list[Path], root: Path) -> None:
    """Every input read, as many bytes written as one checkpoint has, and on the disk before the clock stops."""
    block = bytearray(_BLOCK)
    with (root / "raw").open("wb", buffering=0) as out:
        for path in inputs:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(block):
                    if path.parent.name == "tuned":
                        out.write(memoryview(block)[:count])
        os.fsync(out.fileno())


def _merge_error(root: Path) -> float:
    """Largest difference from the mean of both models, relative; what is no linear layer stays the tuned one's."""
    aligned, tuned, out = (_load(root / name) for name in ("aligned", "tuned", "out"))
    worst = 0.0
    for name, theirs in aligned.items():
        wanted = tuned[name].float()
        if "_proj." in name:
            wanted = (wanted + 0.5 * (theirs.float() - wanted)).bfloat16().float()
        worst = max(worst, float((out[name].float() - wanted).abs().max() / wanted.abs().max()))
    return worst


def _load(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _gradient_rollback(root: Path, machine: Machine) -> list[Row]:
    """It needs gradients of the model and its task score; it has no peer and no floor."""
    hidden, layers, words = SHAPES["tiny"]
    weights = _make_models(root, hidden, layers, words)
    for name in ("aligned", "tuned"):
        _tokenizer(words).save_pretrained(root / name)
    for name in ("harmful", "task"):
        rows = [{"prompt": f"w{i} w{i + 7} w{i + 3}", "response": f"w{i + 1} w2"} for i in range(16)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def restore() -> None:
        curvkern.restore(
            root / "aligned", root / "tuned", out=root / "out", method="gradient_rollback", device=machine.device,
            harmful=root / "harmful.jsonl", task=root / "task.jsonl", overwrite=True, steps=5, warmup=2,
        )  # fmt: skip

    cpu = torch.device("cpu")
    extra = extra_memory(restore, ((), {}), cpu)
    times = interleave({"curvkern": clock_on(cpu, restore)}, 0, rounds=3)["curvkern"]
    row = Row("restore", "bfloat16", f"gradient_rollback Llama {weights / 1e6:.1f} M", "curvkern", "ours")
    return [row.timed(Timing.of(times), extra)]


def _make_models(root: Path, hidden: int, layers: int, words: int) -> int:
    """``aligned`` and ``tuned``, bfloat16; how many weights each has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    shutil.rmtree(root, ignore_errors=True)
    model.save_pretrained(root / "aligned", max_shard_size="1GB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.005)
    model.save_pretrained(root / "tuned", max_shard_size="1GB")
    return sum(p.numel() for p in model.parameters())


def _tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(words - 2))])}
    by_word = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_word, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return tokenizer
