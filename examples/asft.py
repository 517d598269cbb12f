"""Fine-tune LoRA adapters with and without AsFT, and see how much of the update leaves the alignment's directions.

The models are random and tiny; with real ones, load the model before alignment, wrap the aligned one with PEFT, and
pass `callbacks=[guard.callback()]` to the Trainer, or add `guard.penalty(model)` to the loss as below.
"""

from copy import deepcopy

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from curvkern.training import AsFT

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
)
aligned = deepcopy(base)
with torch.no_grad():
    for weight in aligned.parameters():
        if weight.ndim == 2:  # alignment moved each weight along a few directions
            weight += 0.05 * torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1])
data = torch.randint(0, 64, (16, 12))


def fine_tuned(weight: float) -> float:
    """The share of the update that lies outside of the alignment's directions."""
    torch.manual_seed(1)
    model = peft.get_peft_model(deepcopy(aligned), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    guard = AsFT.from_peft(model, base, projector="basis", rank=4, weight=weight)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=data, labels=data).loss + guard.penalty(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    outside = AsFT.from_peft(model, base, projector="basis", rank=4).penalty(model)
    everything = AsFT.from_peft(model, aligned, projector="basis", rank=4).penalty(model)  # no direction, no inside
    print(f"  loss of the data {model(input_ids=data, labels=data).loss:.3f}")
    return float((outside / everything).detach())


for weight in (0.0, 0.1, 1.0):
    print(f"weight {weight:g}")
    print(f"  {fine_tuned(weight):.1%} of the update is outside the alignment subspace")
