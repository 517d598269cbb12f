"""Fine-tune with a moving average of the weights: one line more in the script that is there already.

The average stays nearer to the aligned model, where its safety is. The model here is tiny and its data are noise.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from curvkern.training import WeightEMA

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes))
aligned = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def distance():
    return float((torch.nn.utils.parameters_to_vector(model.parameters()) - aligned).detach().norm())


rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 16))]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=40, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    average = WeightEMA(0.95)
    Trainer(model, arguments, train_dataset=rows, callbacks=[average]).train()

print(f"the model is the average of its {average.step} steps, {distance():.2f} from the aligned one")

# The same in a loop of one's own, from here on.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
average = WeightEMA(0.95).attach(model)
for row in rows[:10]:
    model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update()
live = distance()
with average.swapped():  # evaluate or save here
    print(f"ten steps on: the average is {distance():.2f} away, the weights of training {live:.2f}")
