"""Merging checkpoints: `curvkern restore --method merge` beside mergekit and beside reading and writing the bytes.

python benchmarks/peers/merge.py [millions of weights] [rounds] [directory]

Every way is a process of its own, in turn with the others, from start to end; "work" is what comes after its imports.
curvkern merges the linear modules of the decoder and compares every module with both inputs for its report; mergekit
merges all tensors. Where both do the same, their results must agree. Inputs are in no cache when a process starts;
curvkern and the copy end with all on the disk, what mergekit wrote may still wait in memory. In a directory in memory
(/dev/shm) no disk takes part.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: What mergekit calls it, its parameters for each model and for all, and ours.
KINDS = {
    "linear": ("linear", {"weight": 0.5}, {"normalize": False}, {"kind": "linear", "weight": 0.5}),
    "task arithmetic": ("task_arithmetic", {"weight": 0.5}, {}, {"kind": "linear", "weight": 0.5}),
    "slerp": ("slerp", {}, {"t": 0.5}, {"kind": "slerp", "weight": 0.5}),
    "ties": ("ties", {"weight": 1.0, "density": 0.3}, {}, {"kind": "ties", "weight": 0.0, "density": 0.3}),
    "dare": (
        "dare_linear", {"weight": 1.0, "density": 0.5}, {},
        {"kind": "dare", "weight": 0.0, "density": 0.5, "rescale": "l1"},
    ),
}  # fmt: skip


def make_models(root, millions):
    """``aligned`` and ``tuned``, bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = 2048
    layers = max(1, round(millions / 50))
    config = LlamaConfig(
        vocab_size=16384, hidden_size=hidden, intermediate_size=5632, num_hidden_layers=layers, dtype=torch.bfloat16,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(root / "aligned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.005)
    model.save_pretrained(root / "tuned")
    return sum(p.numel() for p in model.parameters())


def copy(root, kind, out):
    """Both checkpoints read, one written, in one thread as cp does; on the disk when the clock stops."""
    block = bytearray(16 << 20)
    out.mkdir()

    def run():
        with (out / "raw").open("wb", buffering=0) as target:
            for name in ("aligned", "tuned"):
                with (root / name / "model.safetensors").open("rb", buffering=0) as file:
                    while count := file.readinto(block):
                        if name == "tuned":
                            target.write(memoryview(block)[:count])
            os.fsync(target.fileno())

    return run


def curvkern(root, kind, out):
    """The command, without its bar."""
    from curvkern.restore import restore

    return lambda: restore(root / "aligned", root / "tuned", out=out, method="merge", **KINDS[kind][3])


def mergekit(root, kind, out):
    """mergekit's command."""
    from mergekit.scripts.run_yaml import main

    method, each, shared, _ = KINDS[kind]
    models = [{"model": str(root / name), "parameters": each} for name in ("aligned", "tuned")]
    config = {"merge_method": method, "models": models, "parameters": shared, "dtype": "bfloat16"}
    if kind != "linear":
        config["base_model"] = str(root / "aligned")
        config["models"] = models if kind == "slerp" else models[1:]
    path = root / "mergekit.yml"
    path.write_text(json.dumps(config))
    return lambda: main([str(path), str(out), "--no-copy-tokenizer"], standalone_mode=False)


WAYS = {way.__name__: way for way in (copy, curvkern, mergekit)}


def measured(root, way, kind):
    """Seconds of a process, of its work, and its peak bytes; or why it failed."""
    out = root / f"out-{way}"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for file in root.glob("*/*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--run", way, str(root), kind, str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    work, peak = done.stdout.splitlines()[-1].split()
    return seconds, float(work), int(peak)


def apart(root):
    """Largest difference of the linear modules of both results, relative to the largest weight."""
    from safetensors.torch import load_file

    ours, theirs = (
        {n: t for file in (root / f"out-{way}").glob("*.safetensors") for n, t in load_file(file).items()}
        for way in ("curvkern", "mergekit")
    )
    worst = (float((t.float() - theirs[n].float()).abs().max()) for n, t in ours.items() if "_proj." in n)
    return max(worst) / max(float(t.float().abs().max()) for n, t in ours.items() if "_proj." in n)


def main(millions=500, rounds=3, directory=None):
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory(prefix="curvkern-merge-", dir=directory) as name:
        root = Path(name)
        weights = make_models(root, millions)
        table = Table(title=f"merging two Llamas of {weights / 1e6:.0f} M weights, bfloat16; medians of {rounds}")
        for column in ("merge", "way", "process s", "/ mergekit", "work s", "% of copy", "peak MiB", "apart"):
            table.add_column(column)
        for kind in KINDS:
            found = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, runs in found.items():
                    runs.append(measured(root, way, kind))
            ran = {way: runs for way, runs in found.items() if not any(isinstance(run, str) for run in runs)}
            medians = {way: [statistics.median(side) for side in zip(*ran[way], strict=True)] for way in ran}
            for way, runs in found.items():
                if way not in ran:
                    table.add_row(kind, way, "n/a", next(run for run in runs if isinstance(run, str)))
                    continue
                process, work, peak = medians[way]
                cells = [f"{process / medians['mergekit'][0]:.2f}" if "mergekit" in ran else ""]
                cells += [f"{work:.2f}", f"{100 * medians['copy'][1] / work:.0f}", f"{peak / 2**20:.0f}"]
                if way == "mergekit" and "curvkern" in ran and kind != "dare":
                    cells.append(f"{apart(root):.1e}")
                table.add_row(kind, way, f"{process:.1f}", *cells)
        Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        way, root, kind, out = sys.argv[2:]
        run = WAYS[way](Path(root), kind, Path(out))
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        status = Path("/proc/self/status").read_text()  # getrusage counts the parent too
        print(seconds, 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]))
    else:
        main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
