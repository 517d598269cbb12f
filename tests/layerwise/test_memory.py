"""Peak memory, in a process of its own: a few layers, however many the model has."""

import json
import subprocess
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2]
LAYERS = 10

RUN = """
import json, re, sys
import torch
from curvkern.layerwise import LayerwiseModel

def peak():
    # Not getrusage: that of a new process begins with its parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

batches = [{"input_ids": torch.arange(8)[None] + n} for n in range(2)]
loss = lambda model, batch: model(**batch, labels=batch["input_ids"]).loss
with LayerwiseModel.open(sys.argv[1]) as warm:
    warm.backward(batches, loss)
begin = peak()
with LayerwiseModel.open(sys.argv[2]) as model:
    opened = peak()
    report = model.backward(batches, loss)
print(json.dumps({"opening": opened - begin, "running": peak() - begin, "bytes_read": report.bytes_read}))
"""


def test_a_model_of_many_layers_takes_the_memory_of_a_few(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    for name, layers in (("small", 1), ("large", LAYERS)):
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / name, max_shard_size="20MB")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path / "small", tmp_path / "large"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    cost = json.loads(done.stdout)
    assert cost["bytes_read"] == (2 * LAYERS - 1) * layer
    assert cost["opening"] < 2 * layer
    assert cost["running"] < 3 * layer  # beyond the single layer of the model that warmed up
