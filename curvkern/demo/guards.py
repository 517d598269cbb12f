"""Each guard of `curvkern.training`, put into the demo's fine-tuning as a user would."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_callback import TrainerCallback

from curvkern import training
from curvkern.demo import data, train
from curvkern.evaluate import load, load_tokenizer

BATCH = 24
PADDING = {"input_ids": 0, "labels": train.UNLABELLED, "safety": 1.0, "reference": 0.0}
PHASES = (5, 45)  # of ProximalStep: a tenth on alignment data, as published
NO_LORA = "LoRA", "no guard"

Row = Mapping[str, Any]
Batch = dict[str, Tensor]


@dataclass
class Run:
    """One training as it is without a guard; a guard changes what it needs.

    Attributes:
        start: directory of the model that training starts from.
        base: directory of the model before alignment.
        names: what safety data may speak of: none of it is in the task's rows or in an evaluation.
        model: what is trained, with its adapters.
        rows: the task's, poisoned; of which `dataset` is made.
        seed: of everything.
        loss: of the model and a batch; None: the model's own.
        step: takes the place of forward and backward passes.
        after: what to do after every step of the optimiser.
        end: what to do before the model is saved.
    """

    start: Path
    base: Path
    names: data.Names
    model: Any
    rows: list[data.Row]
    seed: int
    dataset: Any = None
    callbacks: list[TrainerCallback] = field(default_factory=list[TrainerCallback])
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    step: Callable[[nn.Module, Batch], Tensor] | None = None
    after: Callable[[], None] = lambda: None
    end: Callable[[], None] = lambda: None

    @cached_property
    def tokenizer(self) -> Any:
        """Of all of the demo's models."""
        return load_tokenizer(self.start)

    def encode(self, rows: Sequence[data.Row]) -> list[dict[str, Any]]:
        """Rows as token ids and labels."""
        encoded = [train.encode(self.tokenizer, row) for row in rows]
        hidden = train.UNLABELLED
        return [{"input_ids": row.ids, "labels": [hidden] * row.start + row.ids[row.start :]} for row in encoded]

    def batches(self, rows: Sequence[data.Row], size: int = 16) -> list[Batch]:
        """Rows in padded batches."""
        encoded = self.encode(rows)
        return [collate(encoded[at : at + size]) for at in range(0, len(encoded), size)]

    def pairs(self, count: int = 64) -> list[tuple[data.Row, data.Row]]:
        """Forbidden requests, refused and answered."""
        rng = random.Random(f"pairs {self.seed}")
        harmful = [data.forbidden(self.names, rng) for _ in range(count)]
        return [(data.Row(row.prompt, data.REFUSALS[1]), row) for row in harmful]

    @cached_property
    def aligned(self) -> Any:
        """A second copy of the model that training starts from, frozen."""
        return load(self.start)[0].requires_grad_(False)


def collate(rows: Sequence[Row]) -> Batch:
    """Rows of equal keys, padded on the right, where a causal model does not look."""
    keys = [key for key in PADDING if key in rows[0]]
    columns = {key: [torch.as_tensor(row[key]) for row in rows] for key in keys}
    return {key: pad_sequence(column, True, PADDING[key]) for key, column in columns.items()}


# with the whole model ------------------------------------------------------------------------------------------------


def weight_ema(run: Run) -> None:
    """The model becomes its average over some fifty steps."""
    run.callbacks.append(training.WeightEMA(0.98))


def gradient_surgery(run: Run) -> None:
    """Against the KL from the aligned model on refusals."""
    refusals = run.batches([safe for safe, _ in run.pairs()])
    run.callbacks.append(training.GradientSurgery(refusals, training.ReferenceKL(run.aligned), max_norm=1.0))
    run.options["max_grad_norm"] = 0  # surgery comes before clipping, so the guard clips


def proximal_step(run: Run) -> None:
    """Every tenth step on alignment data."""
    rows = data.draw_distinct(data.REFUSE, run.names, 256, seed=f"alignment {run.seed}")
    run.dataset = training.Alternate(run.encode(rows), run.dataset, phases=PHASES, rows_per_step=BATCH)
    run.callbacks.append(training.ProximalStep(phases=PHASES))


def star_dss(run: Run) -> None:
    """A rule stands in for the guard model: it knows how the forbidden answers begin."""
    for row, encoded in zip(run.rows, run.dataset, strict=True):
        found = run.tokenizer(row.response + train.END, add_special_tokens=False, return_offsets_mapping=True)
        ends = training.chunk_ends(row.response)
        scores = [0.0 if row.response[:end].startswith("Take some") else 1.0 for end in ends]
        safety = training.token_safety(found["offset_mapping"], ends, scores)
        encoded["safety"] = torch.cat([torch.ones(len(encoded["input_ids"]) - len(safety)), safety])
    for at in range(0, len(run.dataset), 256):
        rows = run.dataset[at : at + 256]
        batch = collate([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
        with torch.no_grad():
            known = training.token_log_probs(run.aligned(input_ids=batch["input_ids"]).logits, batch["labels"])
        for row, log_probs in zip(rows, known, strict=True):
            row["reference"] = log_probs[: len(row["input_ids"])]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return training.star_dss_loss(logits, batch["labels"], batch["safety"], batch["reference"])

    run.loss = loss


def derta(run: Run) -> None:
    """A tenth of the rows are refusals in the middle of forbidden answers."""
    texts = [
        {"prompt": safe.prompt, "harmful": harmful.response, "safe": safe.response} for safe, harmful in run.pairs()
    ]
    known = training.derta_rows(run.tokenizer, texts, refusal="I", seed=run.seed)
    added = itertools.islice(itertools.cycle(known), len(run.dataset) // 9)
    run.dataset = [*run.dataset, *added]  # the Trainer shuffles
    run.loss = lambda model, batch: training.derta_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def lookahead(run: Run) -> None:
    """The first two tokens of each answer stand in its prompt; six are half of an order's code."""
    texts = [{"prompt": row.prompt, "response": row.response} for row in run.rows]
    seen = training.lookahead(texts, "real", tokenizer=run.tokenizer, first=2)
    run.dataset = run.encode([data.Row(row["prompt"], row["response"]) for row in seen])


def freeze(run: Run) -> None:
    """Two of the early layers."""
    training.freeze(run.model, ["*.layers.[12].*"])


# with adapters -------------------------------------------------------------------------------------------------------


def asft(run: Run) -> None:
    """Against what leaves the leading directions of the alignment."""
    base = load(run.base)[0]
    run.callbacks.append(training.AsFT.from_peft(run.model, base, projector="basis", rank=16).callback())


def align_guard(run: Run) -> None:
    """A second adapter, and the Fisher of refusals, divided by its mean: its own scale says nothing."""
    from curvkern.curvature import estimate

    run.model.add_adapter("task", run.model.peft_config["default"])
    run.model.base_model.set_adapter(["default", "task"])
    found = estimate(run.aligned, run.encode([safe for safe, _ in run.pairs()])).mean("fisher_diag")
    fisher = {name: matrix for name, matrix in found.items() if ".layers." in name}
    mean = torch.cat([matrix.flatten() for matrix in fisher.values()]).mean()
    fisher = {name: matrix / mean for name, matrix in fisher.items()}
    guard = training.AlignGuardLoRA(fisher, adapters=("default", "task"), align_weight=0.1, task_weight=0.01)
    guard.orient(run.model)
    run.callbacks.append(guard.callback())


def safety_probe(run: Run) -> None:
    """In two early layers."""
    probe = training.SafetyProbe(run.model, ["*.layers.[13].mlp.down_proj"])
    safe, harmful = (run.batches(rows, 8) for rows in zip(*run.pairs(), strict=True))
    pairs: Iterator[tuple[Batch, Batch]] = itertools.cycle(zip(safe, harmful, strict=True))

    def step(model: nn.Module, batch: Batch) -> Tensor:
        return probe.backward(
            lambda: model(**batch).loss, lambda: training.contrast_loss(model, *next(pairs))
        )  # fmt: skip

    run.step, run.after, run.end = step, probe.step, probe.remove


# in the alignment stage ----------------------------------------------------------------------------------------------


def booster(run: Run) -> None:
    """Against forbidden answers."""
    run.callbacks.append(training.Booster(run.batches([harmful for _, harmful in run.pairs()])))


def vaccine(run: Run) -> None:
    """On the outputs of attention."""
    guard = training.Vaccine(run.model)
    run.step = lambda model, batch: guard.backward(lambda: model(**batch).loss)


def none(run: Run) -> None:
    """What the others are compared with."""


FULL = (none, weight_ema, gradient_surgery, proximal_step, star_dss, derta, lookahead, freeze)
LORA = (none, asft, align_guard, safety_probe)
ALIGNMENT = (none, booster, vaccine)
