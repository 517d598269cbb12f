"""Fine-tune two adapters, one where safety is sensitive and one for the task (AlignGuard-LoRA).

The model is tiny and its data are noise; with a real one the Fisher comes from refusals, by `estimate` as here.
"""

import tempfile

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from curvkern.curvature import estimate
from curvkern.training import AlignGuardLoRA

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
aligned = LlamaForCausalLM(LlamaConfig(**sizes))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 16))]
refusals = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (8, 16)).tolist()]
config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
fisher = estimate(aligned, refusals, include=["*.q_proj.weight", "*.v_proj.weight"]).mean("fisher_diag")

model = peft.get_peft_model(aligned, config, adapter_name="alignment")
model.add_adapter("task", config)
model.base_model.set_adapter(["alignment", "task"])
guard = AlignGuardLoRA(fisher, align_weight=1e3)  # a Fisher is small: scale the weight to it
guard.orient(model)

callback = guard.callback()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=30, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()

for adapter in ("alignment", "task"):
    factors = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    updates = [layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight for layer in factors]
    print(f"{adapter} adapter: update of norm {torch.stack([u.norm() for u in updates]).norm():.3f}")
print(f"penalty of the last step {callback.value:.4f}")
