"""Curvature of a small Llama, whole: `estimate` beside every library that computes the same.

python benchmarks/peers/curvature.py [fisher_diag] [kfac] [ekfac] [hessian_diag] [--samples 16] [--tokens 128] ...

Quantities are `estimate`'s, of each text's mean loss and of the 28 weights in the layers: the empirical Fisher's
diagonal by text, its K-FAC factors, and its diagonal in their eigenbases; and the Hessian's diagonal by two random
directions, the same for all. Every way (`curvature_ways.py`) has a process
of its own and takes all texts as one batch, unless its name says otherwise. Its first result is held against what
autograd gives for one text after the other: what is wrong or fails gets no number but its reason. Then all ways take
turns, run by run. The yardstick is a forward and backward with gradients of the same weights; memory is a run's peak,
less what was resident before it. Libraries are measured where they are installed: pip install 'curvkern[peers]'.
"""

import argparse
import importlib.metadata
import statistics
import time
import warnings
from multiprocessing import get_context

import torch
from curvature_ways import GRAMS, WAYS, by_autograd, by_double_backward, grams_in_hooks, model_and_ids, weights_of
from rich.console import Console
from rich.table import Table

from curvkern.report.record import forget_peak_memory, peak_memory, resident_memory

#: Largest distance of a weight's result from autograd's, relative, in the Frobenius norm; both are float32 sums.
TOLERANCE = 1e-4
#: Differences of gradients are an approximation.
TOLERANCE_OF_HESSIAN = 1e-2


def distance(found, wanted):
    """The largest of all weights'."""
    return max(float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in wanted.items())


def from_autograd(quantity, found, model, ids):
    """How far a result is from autograd's, text by text."""
    if quantity == "fisher_diag":
        return distance(found[quantity], by_autograd(model, ids, quantity)[quantity])
    if quantity == "hessian_diag":
        by_text = [by_double_backward(model, text[None], quantity)[quantity] for text in ids]
        return distance(found[quantity], {name: sum(of[name] for of in by_text) for name in weights_of(model)})
    by_text = [grams_in_hooks(model, text[None], quantity) for text in ids]
    grams = {factor: {name: sum(of[factor][name] for of in by_text) for name in weights_of(model)} for factor in GRAMS}
    if quantity == "kfac":
        return max(distance(found[factor], grams[factor]) for factor in GRAMS)
    u, v = found["input_basis"], found["output_basis"]
    squares = by_autograd(model, ids, quantity, lambda name, gradient: v[name].T @ gradient @ u[name])["fisher_diag"]
    far = [distance(found["ekfac"], squares)]
    for basis, of in zip((u, v), grams.values(), strict=True):  # a Gram is its diagonal in its orthonormal eigenbasis
        diagonals = {name: (basis[name].T @ gram @ basis[name]).diag() for name, gram in of.items()}
        far.append(distance({name: b * diagonals[name] @ b.T for name, b in basis.items()}, of))
    return max(far)


def serve(pipe, quantity, name, sizes):
    """The process of a way: tells how far its first result is from autograd's, or why there is none; then measures."""
    warnings.simplefilter("ignore")
    run, package = WAYS[quantity][name]
    model, ids = model_and_ids(*sizes)
    try:
        found = run(model, ids, quantity)
        pipe.send(from_autograd(quantity, found, *model_and_ids(*sizes)) if found else 0.0)
        del found
    except ModuleNotFoundError as error:
        pipe.send(f"no module {error.name}: pip install {package}")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[:100])
    while (asked := pipe.recv()) != "end":
        model.zero_grad()
        if asked == "extra":
            forget_peak_memory()
        before, start = resident_memory(), time.perf_counter()
        run(model, ids, quantity)
        pipe.send(time.perf_counter() - start if asked == "seconds" else peak_memory() - before)


class Worker:
    """The process of a way; ``told`` is how far its first result is from autograd's, or why there is none."""

    def __init__(self, *task):
        context = get_context("spawn")
        self._pipe, its = context.Pipe()
        self._process = context.Process(target=serve, args=(its, *task), daemon=True)
        self._process.start()
        its.close()
        try:
            self.told = self._pipe.recv()
        except EOFError:
            self.told = "its process came to an end"
        self._tolerance = TOLERANCE_OF_HESSIAN if task[0] == "hessian_diag" else TOLERANCE

    def is_right(self):
        return isinstance(self.told, float) and self.told <= self._tolerance

    def ask(self, what):
        self._pipe.send(what)
        return self._pipe.recv()

    def end(self):
        if self._process.is_alive():
            self._pipe.send("end")
        self._process.join()


def measure(quantity, sizes, runs):
    """A table of all ways to compute a quantity, by the median of their runs."""
    workers = {name: Worker(quantity, name, sizes) for name in WAYS[quantity]}
    right = {name: worker for name, worker in workers.items() if worker.is_right()}
    extra = {name: worker.ask("extra") / 2**20 for name, worker in right.items()}
    turns = [{name: worker.ask("seconds") for name, worker in right.items()} for _ in range(runs)]
    for worker in workers.values():
        worker.end()
    seconds, fastest = ({n: of(turn[n] for turn in turns) for n in right} for of in (statistics.median, min))
    title = f"{quantity}: Llama, 4 layers of 256, {sizes[0]} x {sizes[1]} tokens, {torch.get_num_threads()} threads"
    table = Table(title=title)
    for column in ("way", "seconds", "fastest", "x backward", "extra MiB", "from autograd's"):
        table.add_column(column, overflow="fold")
    for name in sorted(workers, key=lambda name: seconds.get(name, float("inf"))):
        told, figures = workers[name].told, [""] * 4
        if name in right:
            ratio = seconds[name] / seconds["forward and backward"]
            figures = [f"{seconds[name]:.3f}", f"{fastest[name]:.3f}", f"{ratio:.2f}", f"{extra[name]:.0f}"]
        told = f"{told:.0e}" if isinstance(told, float) else told
        table.add_row(with_version(name, WAYS[quantity][name][1]), *figures, told)
    Console().print(table)


def with_version(name, package):
    try:
        return f"{name} {importlib.metadata.version(package)}"
    except (ValueError, importlib.metadata.PackageNotFoundError):  # by hand, or not installed
        return name


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("quantity", nargs="*", choices=[[], *WAYS], default=[])
    for option, default in (("--samples", 16), ("--tokens", 128), ("--runs", 7)):
        parser.add_argument(option, type=int, default=default)
    asked = parser.parse_args()
    for quantity in asked.quantity or WAYS:
        measure(quantity, (asked.samples, asked.tokens), asked.runs)
