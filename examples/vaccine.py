"""Align a model under the worst perturbation of its hidden states (Vaccine): in a loop, and in the Trainer.

For who aligns, before others fine-tune. The model is tiny and its data are noise.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from curvkern.training import Vaccine

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (32, 16))]

vaccine = Vaccine(model, ["*.self_attn"], rho=2.0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for row in rows[:10]:
    batch = {key: value[None] for key, value in row.items()}
    perturbed = vaccine.backward(lambda batch=batch: model(**batch).loss)  # instead of loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"in a loop, the last loss under perturbation: {perturbed:.2f}")


class VaccinatingTrainer(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        batch = self._prepare_inputs(inputs)
        loss = vaccine.backward(lambda: model(**batch).loss / self.args.gradient_accumulation_steps)
        return loss.detach()


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=10, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    done = VaccinatingTrainer(model, arguments, train_dataset=rows).train()
print(f"in the Trainer, {done.global_step} steps, {vaccine.skipped} without perturbation")
