"""The diagonal Fisher of a small Llama, whole: `estimate` beside a bare backward and what one would write by hand.

python benchmarks/curvature.py [samples tokens]

Every way runs in a process of its own, in turn with the others; results must agree. A bare forward and backward is
the yardstick; it forms weight gradients, which ways in hooks do without.
"""

import json
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from curvkern.curvature import Text, estimate
from curvkern.report.record import forget_peak_memory, peak_memory, resident_memory

LAYERS = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip


def model_and_texts(samples, tokens):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LAYERS)).eval()
    ids = torch.randint(0, LAYERS["vocab_size"], (samples, tokens)).tolist()
    return model, [Text(tuple(row), (-100, *row[1:])) for row in ids]


def selected(model):
    return {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}


def losses(model, texts):
    ids = torch.tensor([text.ids for text in texts])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(texts), -1).mean(1)


def only_backward(model, texts):
    """No Fisher: forward and backward of all samples at once."""
    losses(model, texts).sum().backward()


def one_by_one(model, texts):
    """A backward for each sample, squares of ``.grad``."""
    found = {name: torch.zeros_like(p) for name, p in selected(model).items()}
    for text in texts:
        model.zero_grad()
        losses(model, [text]).sum().backward()
        for name, total in found.items():
            total.addcmul_(*[model.get_parameter(name).grad] * 2)
    return found


def _hooked(model, texts, square):
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def after(module, inputs, output, name=f"{name}.weight"):
                output.register_hook(lambda d: found.update({name: square(d, inputs[0].detach())}))

            handles.append(module.register_forward_hook(after))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    losses(model, texts).sum().backward()
    for handle in handles:
        handle.remove()
    return found


def loop_in_hooks(model, texts):
    """One product for each sample and weight, in backward hooks."""

    def square(d, x):
        total = torch.zeros(d.shape[2], x.shape[2])
        for one, other in zip(d, x, strict=True):
            grad = one.T @ other
            total.addcmul_(grad, grad)
        return total

    return _hooked(model, texts, square)


def einsum_in_hooks(model, texts):
    """All samples' gradients of a weight at once, as most packages do."""
    return _hooked(model, texts, lambda d, x: torch.einsum("nto,nti->noi", d, x).square_().sum(0))


def curvkern(model, texts):
    """`estimate`."""
    return estimate(model, texts, quantity="fisher_diag", batch_tokens=1 << 30)["fisher_diag"]


WAYS = {way.__name__: way for way in (only_backward, one_by_one, loop_in_hooks, einsum_in_hooks, curvkern)}


def measure(name, samples, tokens):
    """Seconds of five runs, bytes at the peak of the last, and a checksum."""
    model, texts = model_and_texts(samples, tokens)
    seconds = []
    for _ in range(6):
        model.zero_grad()
        forget_peak_memory()
        before, start = resident_memory(), time.perf_counter()
        found = WAYS[name](model, texts)
        seconds.append(time.perf_counter() - start)
        extra = peak_memory() - before
        total = sum(t.double().sum().item() for t in found.values()) if found else None
        del found
    return {"seconds": seconds[1:], "extra": extra, "total": total}


def main(samples=16, tokens=128):
    """Print the table."""
    found = {name: [] for name in WAYS}
    for _ in range(3):
        for name in WAYS:
            command = [sys.executable, __file__, "--measure", name, str(samples), str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    totals = {name: runs[0]["total"] for name, runs in found.items() if runs[0]["total"]}
    reference = totals["one_by_one"]
    table = Table(title=f"diagonal Fisher of a Llama of 4 layers of 256, {samples} x {tokens} tokens, CPU")
    for column in ("way", "seconds", "x backward", "extra MiB", "sum against one by one"):
        table.add_column(column)
    bare = statistics.median(s for run in found["only_backward"] for s in run["seconds"])
    for name, runs in found.items():
        median = statistics.median(s for run in runs for s in run["seconds"])
        apart = f"{totals[name] / reference - 1:+.1e}" if name in totals else ""
        extra = statistics.median(run["extra"] for run in runs) / 2**20
        table.add_row(name, f"{median:.3f}", f"{median / bare:.2f}", f"{extra:.0f}", apart)
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main(*map(int, sys.argv[1:]))
