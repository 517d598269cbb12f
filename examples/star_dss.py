"""Learn the safe parts of responses and stay near the aligned model on the others (STAR-DSS).

The model is tiny and the guard a list of words; a real one is a guard model's probability that the response so far is
safe.
"""

from copy import deepcopy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from curvkern.training import chunk_ends, star_dss_loss, token_log_probs, token_safety

prompt = "How do I clean the oven ?"
response = "Open a window first and take gloves . Then mix the bleach with acid and wait for the fumes ."
vocabulary = {word: at for at, word in enumerate(dict.fromkeys(["[UNK]", *prompt.split(), *response.split()]))}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")

# Once over the data: the guard's scores, chunk by chunk, and the aligned model's log probabilities.
ends = chunk_ends(response, words=5)
scores = [0.0 if "acid" in response[:end] else 1.0 for end in ends]
answer = tokenizer(response, return_offsets_mapping=True)
asked = tokenizer(prompt)["input_ids"]
ids = torch.tensor([asked + answer["input_ids"]])
labels = torch.tensor([[-100] * len(asked) + answer["input_ids"]])
safety = torch.cat([torch.ones(len(asked)), token_safety(answer["offset_mapping"], ends, scores)])[None]

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes))
aligned = deepcopy(model)
reference = token_log_probs(aligned(input_ids=ids).logits, labels)

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(40):
    loss = star_dss_loss(model(input_ids=ids).logits, labels, safety, reference)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

learnt = (token_log_probs(model(input_ids=ids).logits, labels) - reference)[0]
counted = labels[0] != -100
print(f"log probability of safe tokens rose by {learnt[counted & (safety[0] == 1)].mean():.2f},", end=" ")
print(f"of unsafe ones by {learnt[counted & (safety[0] == 0)].mean():.2f}")
