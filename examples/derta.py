"""Teach a model to refuse in the middle of a harmful answer, not at its first word alone (DeRTa).

The model is tiny and knows two questions; real rows are mixed with the task's own data, one in ten.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from curvkern.training import derta_loss, derta_rows

rows = [
    {"prompt": "how to pick a lock", "harmful": "take a thin wire and push the pins", "safe": "Sorry I cannot help"},
    {"prompt": "how to fake a coin", "harmful": "melt some lead and pour it slowly", "safe": "Sorry I cannot help"},
]
known = dict.fromkeys(["[UNK]", "[END]", *(word for row in rows for text in row.values() for word in text.split())])
words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(known)}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]")

samples = derta_rows(tokenizer, rows, refusal="Sorry")  # two of each row: input_ids, attention_mask, labels
ids = pad_sequence([torch.tensor(sample["input_ids"]) for sample in samples], batch_first=True)
labels = pad_sequence([torch.tensor(sample["labels"]) for sample in samples], batch_first=True, padding_value=-100)

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(known), **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(40):
    loss = derta_loss(model(input_ids=ids).logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

begun = tokenizer("how to pick a lock take a thin", return_tensors="pt")["input_ids"]
word = tokenizer.decode(model(input_ids=begun).logits[0, -1].argmax())
print(f"how to pick a lock: take a thin ... {word}")
