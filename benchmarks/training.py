"""What a guard's penalty adds to a training step: LoRA on a small Llama, with each guard and with none.

python benchmarks/training.py [samples tokens steps]

All ways take their steps in turn, each on a model of its own, so that whatever else the machine does falls on all. The
dense way is the published code's: C kept as [o, o], the update and its residue formed; its adapters are on q and v.
"""

import statistics
import sys
import time
from collections.abc import Callable

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvkern.training import AlignGuardLoRA, AsFT

SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Penalty = Callable[[nn.Module], Tensor]


def wrapped(adapters, targets):
    """An aligned model with fresh adapters, and the model before alignment."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(DEVICE)
    base = {name: weight + 1e-3 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=targets)
    model = peft.get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model, base


def lora_layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


def dense(model, base) -> Penalty:
    maps = {}
    for name, layer in lora_layers(model).items():
        v = layer.base_layer.weight.detach() - base[f"{name}.weight"]
        maps[name] = v @ v.mT / v.norm()

    def penalty(model):
        total = torch.zeros((), device=DEVICE)
        for name, layer in lora_layers(model).items():
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            outside = torch.eye(len(update), device=DEVICE) - maps[name]
            total = total + (outside @ update).square().sum()
        return total

    return penalty


def no_penalty(model, base) -> Penalty:
    return lambda model: torch.zeros((), device=DEVICE)


def gram(model, base) -> Penalty:
    return AsFT.from_peft(model, base).penalty


def basis(model, base) -> Penalty:
    return AsFT.from_peft(model, base, projector="basis").penalty


def align_guard(model, base) -> Penalty:
    fisher = {name: layer.base_layer.weight.detach().square() for name, layer in lora_layers(model).items()}
    return AlignGuardLoRA(fisher).penalty


ONE, TWO = ("default",), ("alignment", "task")
WAYS = {
    "q, v: no guard": (no_penalty, ONE, ["q_proj", "v_proj"]),
    "q, v: AsFT, gram": (gram, ONE, ["q_proj", "v_proj"]),
    "q, v: AsFT, basis of 64": (basis, ONE, ["q_proj", "v_proj"]),
    "q, v: AsFT, dense": (dense, ONE, ["q_proj", "v_proj"]),
    "all: no guard": (no_penalty, ONE, "all-linear"),
    "all: AsFT, gram": (gram, ONE, "all-linear"),
    "all: AsFT, basis of 64": (basis, ONE, "all-linear"),
    "all: AsFT, dense": (dense, ONE, "all-linear"),
    "all: no guard, two adapters": (no_penalty, TWO, "all-linear"),
    "all: AlignGuard-LoRA": (align_guard, TWO, "all-linear"),
}


class Run:
    """One way's model; `step` gives its seconds, and those of the penalty's own forward and backward."""

    def __init__(self, make, adapters, targets):
        self.model, base = wrapped(adapters, targets)
        self.penalty = make(self.model, base)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, ids):
        start = now()
        penalty = self.penalty(self.model)
        if penalty.requires_grad:
            penalty.backward()
        middle = now()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = now()
        return end - start, middle - start


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(samples=8, tokens=512, steps=7):
    runs = {name: Run(*way) for name, way in WAYS.items()}
    ids = torch.randint(0, SHAPE["vocab_size"], (samples, tokens), device=DEVICE)
    times = {name: [] for name in runs}
    for round_ in range(steps + 1):
        for name, run in runs.items():
            found = run.step(ids)
            if round_:  # the first warms up
                times[name].append(found)
    table = Table("way", "step, ms", "penalty, ms", "share of the bare step")
    for name, found in times.items():
        step, penalty = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
        table.add_row(name, f"{step:.1f}", f"{penalty:.2f}", f"{penalty / (step - penalty):.1%}")
    Console().print(f"{samples} x {tokens} tokens, {steps} steps in turn, {DEVICE}", table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
