"""Alternate between refusals and the task (Lisa), each phase held to where it began.

The model is tiny and the data are noise; with real ones take the published phases, 100 and 900 steps.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from curvkern.training import Alternate, ProximalStep

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes))
refusals, task = (
    [{"input_ids": ids, "labels": ids} for ids in torch.randint(low, low + 32, (rows, 16))]
    for low, rows in ((0, 8), (32, 64))
)

phases = (2, 8)
rows = Alternate(refusals, task, phases=phases, rows_per_step=4)  # never ends, so max_steps says when
guard = ProximalStep(rho=1.0, phases=phases)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=40, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[guard]).train()


def loss(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return float(model(input_ids=ids, labels=ids).loss.detach())


print(f"{guard.step} steps in turn: loss on refusals {loss(refusals):.2f}, on the task {loss(task):.2f}")
