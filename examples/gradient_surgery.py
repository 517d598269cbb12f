"""Fine-tune without working against refusals: what conflicts with them is taken out of each step's gradient.

The model here is tiny and its data are noise; with a real one, `refusals` are harmful prompts with refusals, and twenty
of them are enough.
"""

import tempfile
from copy import deepcopy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from curvkern.training import GradientSurgery, ReferenceKL

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes))
aligned = deepcopy(model)  # with adapters on the aligned model, ReferenceKL() needs no second one


def batch(rows):
    ids = torch.randint(64, (rows, 16))
    labels = ids.clone()
    labels[:, :8] = -100  # the prompt: only the response counts
    return {"input_ids": ids, "labels": labels}


rows = [{key: value[0] for key, value in batch(1).items()} for _ in range(32)]
refusals = [batch(4) for _ in range(5)]
surgery = GradientSurgery(refusals, ReferenceKL(aligned), rho=1.0, max_norm=1.0)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        max_grad_norm=0,  # surgery comes before clipping, so the guard clips
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[surgery]).train()

drift = sum(float(ReferenceKL(aligned)(model, refusal).detach()) for refusal in refusals) / len(refusals)
print(f"{surgery.steps} steps, {surgery.conflicts} in conflict, {surgery.skipped} skipped; KL on refusals {drift:.3f}")
