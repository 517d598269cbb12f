"""What each guard adds to a training step of a small Llama, full and LoRA, and the list ops against other ways.

python benchmarks/training.py [samples tokens steps]

All ways take their steps in turn, each on a model of its own, so that whatever else the machine does falls on all. The
dense way is the published code's of AsFT: C kept as [o, o], the update and its residue formed.
"""

import statistics
import sys
import time
from copy import deepcopy

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from curvkern import lerp_list_, surgery_list_, training

SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(DEVICE)


def adapted(targets="all-linear", adapters=("default",)):
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=targets)
    model = peft.get_peft_model(llama(), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model


class Run:
    """A model, and how a way makes its gradient; `after` comes after the optimiser's step."""

    def __init__(self, model, data):
        self.model, self.data, self.after = model, data, lambda: None
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def loss(self):
        return self.model(input_ids=self.data["task"], labels=self.data["task"]).loss

    def backward(self):
        self.loss().backward()

    def batch(self, name):
        """A quarter of a step's rows, as guards need few."""
        ids = self.data[name][: max(1, len(self.data[name]) // 4)]
        return {"input_ids": ids, "labels": ids}

    def step(self):
        start = now()
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after()
        return now() - start


# what a way changes ---------------------------------------------------------------------------------------------------


def bare(run):
    pass


def penalised(run, penalty):
    def backward():
        penalty(run.model).backward()
        Run.backward(run)

    run.backward = backward


def lora_layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


def asft(run, **options):
    base = {name: weight + 1e-3 * torch.randn_like(weight) for name, weight in llama().state_dict().items()}
    penalised(run, training.AsFT.from_peft(run.model, base, **options).penalty)


def asft_basis(run):
    asft(run, projector="basis")


def asft_dense(run):
    maps = {}
    for name, layer in lora_layers(run.model).items():
        v = 1e-3 * torch.randn_like(layer.base_layer.weight)
        maps[name] = v @ v.mT / v.norm()

    def penalty(model):
        total = torch.zeros((), device=DEVICE)
        for name, layer in lora_layers(model).items():
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            total = total + ((torch.eye(len(update), device=DEVICE) - maps[name]) @ update).square().sum()
        return total

    penalised(run, penalty)


def align_guard(run):
    fisher = {name: layer.base_layer.weight.detach().square() for name, layer in lora_layers(run.model).items()}
    penalised(run, training.AlignGuardLoRA(fisher).penalty)


def edited(run, edit):
    """A gradient that a guard changes after the backward pass."""

    def backward():
        Run.backward(run)
        edit()

    run.backward = backward


def gradient_surgery(run):
    loss = training.ReferenceKL(None if hasattr(run.model, "disable_adapter") else deepcopy(run.model))
    edited(run, training.GradientSurgery([run.batch("safe")], loss).attach(run.model).edit_)


def booster(run):
    edited(run, training.Booster([run.batch("harmful")]).attach(run.model).add_gradient_)


def proximal_step(run):
    guard = training.ProximalStep().attach(run.model)
    edited(run, lambda: (guard.begin_step(), guard.add_gradient_()))


def weight_ema(run):
    run.after = training.WeightEMA(0.995).attach(run.model).update


def safety_probe(run):
    probe = training.SafetyProbe(run.model, ["*.layers.[13].mlp.down_proj"])
    pair = run.batch("safe"), run.batch("harmful")
    run.backward = lambda: probe.backward(run.loss, lambda: training.contrast_loss(run.model, *pair))
    run.after = probe.step


def vaccine(run):
    guard = training.Vaccine(run.model)
    run.backward = lambda: guard.backward(run.loss)


def star_dss(run):
    ids = run.data["task"]
    with torch.no_grad():
        reference = training.token_log_probs(run.model(input_ids=ids).logits, ids)
    safety = torch.ones_like(reference)
    run.loss = lambda: training.star_dss_loss(run.model(input_ids=ids).logits, ids, safety, reference)


def derta(run):
    ids = run.data["task"]
    run.loss = lambda: training.derta_loss(run.model(input_ids=ids).logits, ids)


def freeze(run):
    training.freeze(run.model, ["*.layers.[12].*"])


QV = ["q_proj", "v_proj"]
WAYS = {
    "full": (llama, (bare, weight_ema, gradient_surgery, proximal_step, booster, vaccine, star_dss, derta, freeze)),
    "LoRA on all": (
        adapted,
        (bare, weight_ema, gradient_surgery, proximal_step, booster, safety_probe, asft, asft_basis, asft_dense),
    ),
    "LoRA on q, v": (lambda: adapted(QV), (bare, asft, asft_basis, asft_dense)),
    "two adapters on all": (lambda: adapted(adapters=("alignment", "task")), (bare, align_guard)),
}  # fmt: skip


def steps_of_all(samples, tokens, steps):
    data = {
        name: torch.randint(SHAPE["vocab_size"], (samples, tokens), device=DEVICE)
        for name in ("task", "safe", "harmful")
    }
    runs = {}
    for kind, (make, ways) in WAYS.items():
        for way in ways:
            run = runs[kind, way.__name__] = Run(make(), data)
            way(run)
    times = {name: [] for name in runs}
    for round_ in range(steps + 1):
        for name, run in runs.items():
            seconds = run.step()
            if round_:  # the first warms up
                times[name].append(seconds)
    table = Table("tuned", "guard", "step, ms", "against the bare step")
    for (kind, name), found in times.items():
        more = statistics.median(a / b for a, b in zip(found, times[kind, "bare"], strict=True)) - 1
        table.add_row(kind, name, f"{1e3 * statistics.median(found):.0f}", f"{more:+.1%}" if name != "bare" else "")
    Console().print(f"{samples} x {tokens} tokens, {steps} steps in turn, {DEVICE}", table)


# the list ops ---------------------------------------------------------------------------------------------------------


def foreach_lerp(average, weights):
    torch._foreach_lerp_(average, [w.float() for w in weights], 0.005)


def looped_lerp(average, weights):
    for k, w in enumerate(weights):
        average[k] = 0.995 * average[k].clone() + 0.005 * w.detach().clone()


def foreach_surgery(user, safe):
    dot = torch.stack([(u * s).sum() for u, s in zip(user, safe, strict=True)]).sum()
    norm = torch.stack(torch._foreach_norm(safe)).square().sum()
    share = float(torch.where(dot < 0, 1 - dot / norm, torch.ones_like(dot)))
    torch._foreach_add_(user, safe, alpha=share)


def looped_surgery(user, safe):
    u, s = (torch.cat([g.clone().flatten() for g in each]) for each in (user, safe))
    dot = torch.dot(u, s)
    share = 1 - dot / s.square().sum() if dot < 0 else 1.0
    for g, other in zip(user, safe, strict=True):
        g.copy_(g.clone() + share * other)


OPS = {
    "moving average": (lambda a, w: lerp_list_(a, w, 0.005), foreach_lerp, looped_lerp),
    "surgery": (lambda u, s: surgery_list_(u, s, 1.0), foreach_surgery, looped_surgery),
}


def list_ops(repeats):
    shapes = {"full": [p.shape for p in llama().parameters()]}
    shapes["LoRA"] = [p.shape for p in adapted().parameters() if p.requires_grad]
    table = Table("op", "tensors", "of", "curvkern, ms", "torch._foreach, ms", "loop with clones, ms")
    for op, ways in OPS.items():
        for kind, sizes in shapes.items():
            for dtype in (torch.float32, torch.bfloat16):
                first = torch.float32 if op == "moving average" else dtype
                lists = [[torch.randn(s, device=DEVICE).to(d) for s in sizes] for d in (first, dtype)]
                times = {way: [] for way in ways}
                for _ in range(repeats + 1):
                    for way in ways:
                        start = now()
                        way(*lists)
                        times[way].append(now() - start)
                millis = [f"{1e3 * statistics.median(found[1:]):.2f}" for found in times.values()]
                table.add_row(op, f"{len(sizes)}, {kind}", str(dtype).removeprefix("torch."), *millis)
    Console().print(table)


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(samples=8, tokens=512, steps=7):
    list_ops(5 * steps)
    steps_of_all(samples, tokens, steps)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
