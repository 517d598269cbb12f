"""Fine-tune adapters with vectors in the hidden states that make steps towards harm look bad (SAP).

The model is tiny and its data are noise; real pairs are one harmful prompt with a safe and with a harmful answer.
"""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from curvkern.training import SafetyProbe, contrast_loss

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config)


def batch(low):
    ids = torch.cat([prompt, torch.randint(low, low + 32, (4, 8))], 1)
    labels = ids.clone()
    labels[:, :8] = -100  # the prompt: only the answer counts
    return {"input_ids": ids, "labels": labels}


prompt = torch.randint(64, (4, 8))
task, safe, harmful = batch(16), batch(0), batch(32)

probe = SafetyProbe(model, ["*.layers.[13].mlp.down_proj"])  # published for 32 layers: 3 and 9
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(20):
    loss = probe.backward(lambda: model(**task).loss, lambda: contrast_loss(model, safe, harmful))
    optimizer.step()
    optimizer.zero_grad()
    probe.step()  # after the optimiser's

with probe.off(), torch.no_grad():  # evaluate, generate and save here
    without = model(**task).loss
lengths = ", ".join(f"{float(vector.detach().norm()):.2f}" for vector in probe.vectors.values())
print(f"loss {loss:.2f} with the vectors, {without:.2f} without; their lengths are {lengths}")
