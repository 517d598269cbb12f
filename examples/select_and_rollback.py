"""Roll back the one percent of a model's weights that the Fisher says matter most, layer by layer.

The kernels of curvkern called from code of one's own: nothing here but torch and the ops.
"""

import torch

import curvkern

torch.manual_seed(0)
aligned = [torch.randn(512, 256) for _ in range(4)]
tuned = [w + 0.01 * torch.randn_like(w) for w in aligned]
fisher = [torch.zeros_like(w) for w in aligned]

# Curvature: the squared gradient of every sequence, summed; no [n, out, in] tensor exists.
for f in fisher:
    for _ in range(2):  # two batches of 8 sequences of 32 tokens
        curvkern.fisher_diag_(f, torch.randn(8, 32, 512), torch.randn(8, 32, 256))

# The exact 1 % quantile of F (W - W_aligned)^2 over all layers, streamed in two sweeps.
selector = curvkern.Selector("fisher")
for sweep in range(2):
    for w, target, f in zip(tuned, aligned, fisher, strict=True):
        selector.observe(w, target, fisher=f)
    if sweep == 0 and not selector.refine(fraction=0.01):
        break
threshold = selector.threshold(fraction=0.01, ties="exact_k")

count = 0
for w, target, f in zip(tuned, aligned, fisher, strict=True):
    undo = torch.empty(-(-w.numel() // 8), dtype=torch.uint8)  # one bit per weight, to take it back
    count += int(curvkern.rollback_(w, target, threshold, rule="fisher", fisher=f, undo=undo))
total = sum(w.numel() for w in tuned)
print(f"rolled back {count} of {total} weights")
for choice in curvkern.explain(curvkern.rollback_, tuned[0], aligned[0], 0.1, rule="delta"):
    print(f"  {choice.backend:<10}{'*' if choice.chosen else ' '} {choice.reason}")
