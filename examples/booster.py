"""Align a model so that a later step towards harm gains little (Booster), and look at what such a step gains.

For who aligns, before others fine-tune. The model is tiny and its data are noise.
"""

import tempfile
from copy import deepcopy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from curvkern.training import Booster

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
start = LlamaForCausalLM(LlamaConfig(**sizes))
safe = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (32, 16))]
harmful = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, 64, (4, 4, 16))]  # batches


def aligned(*callbacks):
    model = deepcopy(start)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=30, learning_rate=5e-3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        Trainer(model, arguments, train_dataset=safe, callbacks=list(callbacks)).train()
    return model


def gain_of_harm(model):
    """How far one normalised harmful step lowers the loss of harmful answers."""
    parameters = list(model.parameters())
    before = model(**harmful[0]).loss
    gradients = torch.autograd.grad(before, parameters)
    length = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p -= 0.1 * g / length
        return float(before - model(**harmful[0]).loss)


print(f"a harmful step gains {gain_of_harm(aligned()):.4f} after plain alignment")
print(f"a harmful step gains {gain_of_harm(aligned(Booster(harmful))):.4f} after alignment with Booster")
