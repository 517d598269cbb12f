"""Fine-tune with some layers frozen, those that keep a model safe.

The model is tiny; which layers they are must be found for each real model.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from curvkern.training import freeze

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes))
aligned = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

frozen = freeze(model, ["*.layers.[12].*"])  # before the Trainer is made
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 16))]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=10, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows).train()
frozen.thaw()

moved = {
    name.split(".")[2] for name, p in model.named_parameters() if ".layers." in name and not p.equal(aligned[name])
}
print(f"{frozen.count} numbers were frozen; moved: layers {' '.join(sorted(moved))}")
