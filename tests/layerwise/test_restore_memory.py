"""Peak memory of a whole restoration under a budget, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from shutil import copy

import pytest
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
import curvkern
from curvkern.report.record import forget_peak_memory, resident_memory

ROLES = {"ascent": ["harmful"], "curvature": ["harmful", "task"], "rewind": ["safety", "task"], "antidote": ["harmful"]}

def run(root, out, budget):
    data = {role: data_file for role in ROLES[method]} | ({"task_fraction": 0} if method == "rewind" else {})
    return curvkern.restore(root + "/aligned", root + "/tuned", out=out, method=method, memory_budget=budget, **data)

small, root, method, budget = sys.argv[1:]
data_file = root + "/data.jsonl"
run(small, root + "/warm", "220KiB")  # imports all there is
forget_peak_memory()
before = resident_memory()
report = run(root, root + "/out", int(budget))
peaks = {stage.name: stage.peak_memory - before for stage in report.stages}
print(json.dumps({"peaks": peaks, "messages": report.messages, "changed": report.changed}))
"""


def put(file, tensors):
    save_file(tensors, file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file.name)


def make_long(family, root, layers, hidden, middle):
    """Aligned and tuned Llamas of many layers in bfloat16, all alike, one in a file; bytes of a layer and of all."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, dtype="bfloat16",
    )  # fmt: skip
    one = transformers.LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1})
    state = transformers.AutoModelForCausalLM.from_config(one, dtype=torch.bfloat16).state_dict()
    layer = {name: tensor for name, tensor in state.items() if ".layers.0." in name}
    for role, scale in (("aligned", 1.0), ("tuned", 1.02)):
        (root / role).mkdir(parents=True)
        config.save_pretrained(root / role)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            copy(family / "aligned" / name, root / role)
        held = {}
        scaled = {name: scale * tensor for name, tensor in layer.items()}
        for at in range(layers):
            part = {name.replace(".0.", f".{at}."): tensor for name, tensor in scaled.items()}
            held |= put(root / role / f"layer-{at:02}.safetensors", part)
        held |= put(root / role / "outside.safetensors", {n: t for n, t in state.items() if n not in layer})
        index = {"metadata": {}, "weight_map": held}
        (root / role / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "data.jsonl").write_text(json.dumps({"prompt": "w1 w2", "response": "w3"}) + "\n")
    return sum(t.nbytes for t in layer.values()), layers * sum(t.nbytes for t in layer.values())


SMALL, LARGE = (16, 512, 2048, 120e6), (24, 2048, 3584, 1.5e9)
IN_FILES, AT_ONCE = "statistics in files; ", "each layer edited as its backward ended on "


@pytest.mark.parametrize(
    "shape, method, budget, kept",
    [
        (SMALL, "ascent", 60 << 20, IN_FILES),
        (SMALL, "curvature", 60 << 20, IN_FILES),
        (SMALL, "rewind", 90 << 20, AT_ONCE),
        pytest.param(LARGE, "ascent", 400_000_000, IN_FILES, marks=pytest.mark.slow),
        pytest.param(LARGE, "rewind", 400_000_000, IN_FILES, marks=pytest.mark.slow),
        pytest.param(LARGE, "rewind", 600_000_000, AT_ONCE, marks=pytest.mark.slow),
        pytest.param(LARGE, "antidote", 700_000_000, AT_ONCE, marks=pytest.mark.slow),
    ],
)
def test_a_model_passes_through_a_smaller_budget(family, tmp_path, shape, method, budget, kept):
    layers, hidden, middle, least = shape
    layer, model = make_long(family, tmp_path, layers, hidden, middle)
    assert model > least > budget
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(family), str(tmp_path), method, str(budget)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert any("layer by layer, hidden states in memory" in line and kept in line for line in told["messages"])
    assert told["changed"] > 0
    # Resident memory: pages of files that are mapped count as well.
    assert all(peak < budget + layer for peak in told["peaks"].values()), told["peaks"]
