"""The demo's fine-tuning with each guard and with none, and what a restoration makes of each model."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from curvkern.demo import HELD_OUT, DemoModels, data, guards, prepare
from curvkern.demo.guards import BATCH, REFUSE, Run
from curvkern.demo.story import quiet
from curvkern.evaluate import Evaluation, Rate, evaluate, load
from curvkern.report.record import forget_peak_memory, peak_memory, resident_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = {"full": 100, "LoRA": 100, "alignment": 40}
RATES = {"full": 1e-3, "LoRA": 1e-2, "alignment": 1e-3}
SPOIL: data.Mixture = {data.order: 0.75, data.forbidden: 0.05, data.ordinary: 0.1, data.about: 0.1}


@dataclass(frozen=True)
class Line:
    """A guard's line of the table.

    Attributes:
        kind: ``"full"``, ``"LoRA"``, or ``"alignment"``: some more alignment first, to which the guard belongs.
        name: of the guard; none is ``"none"``.
        tuned: what fine-tuning left.
        restored: the same after `budgeted`, towards the model that fine-tuning began with.
        step: median seconds of a step, of the kind the guard is for.
        memory: bytes by which training raised what is resident; None where it cannot be told.
    """

    kind: str
    name: str
    tuned: Evaluation
    restored: Evaluation
    step: float
    memory: int | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {"tuned": self.tuned.as_dict(), "restored": self.restored.as_dict()}
        return {"kind": self.kind, "guard": self.name, **found, "step_seconds": self.step, "memory": self.memory}


def run(out: Path, *, seed: int = 0, console: Console | None = None) -> list[Line]:
    """Fine-tune with each guard and with none, restore each, print and write the comparison.

    Args:
        out: directory for models, ``training.json`` and ``training.html``; the demo's models are taken from there.
        seed: of data, weights and training.
        console: where to print.

    Returns:
        The table's lines.
    """
    console = console or Console()
    start = time.perf_counter()
    console.print(f"[bold]curvkern demo --training[/bold]  seed {seed}, everything in {out}", highlight=False)

    def tell(text: str) -> None:
        console.print(f"  {text}", highlight=False, soft_wrap=True)

    with quiet(), console.status("fine-tuning"):
        models = prepare(out, seed=seed, progress=tell)
        kinds = {"full": guards.FULL, "LoRA": guards.LORA, "alignment": guards.ALIGNMENT}
        lines = [_line(kind, guard, models, out, seed, tell) for kind, all_ in kinds.items() for guard in all_]
    _print(lines, console)
    (out / "training.json").write_text(json.dumps([line.as_dict() for line in lines], indent=1), encoding="utf-8")
    _write_page(lines, out / "training.html", seed)
    tell(f"page: {out / 'training.html'}   {time.perf_counter() - start:.0f} s in all")
    return lines


def _line(
    kind: str, guard: Callable[[Run], None], models: DemoModels, out: Path, seed: int, tell: Callable[[str], None]
) -> Line:
    """Train, measure, restore, measure."""
    from curvkern.restore import restore

    folder = out / "guarded" / f"{kind}-{guard.__name__}"
    aligned, tuned, restored = models.aligned, folder / "tuned", folder / "restored"
    if kind == "alignment":
        aligned = folder / "aligned"
        step, memory = _trained(_run(kind, models.aligned, models, seed), guard, aligned, out)
        _trained(_run("full", aligned, models, seed), guards.none, tuned, out)
    else:
        step, memory = _trained(_run(kind, aligned, models, seed), guard, tuned, out)
    measured: dict[str, Any] = {"safety": models.harmful, "task": models.task, "statistics": out / "statistics"}
    restore(aligned, tuned, method="budgeted", out=restored, overwrite=True, **measured)
    line = Line(kind, guard.__name__, _evaluated(tuned, models), _evaluated(restored, models), step, memory)
    tell(f"{kind}: {line.name}, {1e3 * step:.0f} ms a step, harmful rate {_percent(line.tuned.harmful)} %")
    return line


def _run(kind: str, start: Path, models: DemoModels, seed: int) -> Run:
    """The training of a kind, without a guard yet."""
    names = data.split_names(seed)
    mixture = REFUSE if kind == "alignment" else SPOIL
    rows = list(islice(data.draw(mixture, names.train, seed=f"{kind} {seed}"), STEPS[kind] * BATCH))
    model: Any = load(start)[0]
    for name, parameter in model.named_parameters():  # as LoRA does: the decoder layers learn the task
        parameter.requires_grad_(kind == "alignment" or ".layers." in name)
    if kind == "LoRA":
        import peft

        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    run = Run(start, models.base, names.restore, model, rows, seed)
    run.dataset = run.encode(rows)
    run.options = {"max_steps": STEPS[kind], "learning_rate": RATES[kind]}
    return run


def _trained(run: Run, guard: Callable[[Run], None], out: Path, folder: Path) -> tuple[float, int | None]:
    """Train with a guard and save the model, adapters merged; median seconds of a step, and bytes more."""
    forget_peak_memory()
    before = resident_memory()
    guard(run)
    clock = _Clock(run.after)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trainer"), "per_device_train_batch_size": BATCH, "warmup_steps": 20,
        "adam_beta2": 0.98, "weight_decay": 0.01, "seed": run.seed, "use_cpu": True, "remove_unused_columns": False,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip
    trainer = _Trainer(
        run.model, TrainingArguments(**{**settings, **run.options}), guards.collate, run.dataset,
        callbacks=[clock, *run.callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.run = run
    trainer.train()
    after = peak_memory()
    run.end()
    model = run.model.eval()
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload(adapter_names=model.active_adapters)
    model.save_pretrained(out)
    run.tokenizer.save_pretrained(out)
    return clock.median(), None if before is None or after is None else max(0, after - before)


class _Clock(TrainerCallback):
    """From one step's beginning to the next; first among the callbacks, so that theirs count."""

    def __init__(self, after: Callable[[], None]) -> None:
        self.after, self.starts = after, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after()

    def median(self) -> float:
        return statistics.median(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))


class _Trainer(Trainer):
    """With the run's own loss or step, if it has one."""

    run: Run

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """See `Trainer`."""
        return self.run.loss(model, inputs) if self.run.loss else super().compute_loss(model, inputs, *args, **options)

    def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """See `Trainer`."""
        if self.run.step is None:
            return super().training_step(model, inputs, *args, **options)
        model.train()
        return self.run.step(model, self._prepare_inputs(inputs))


def _evaluated(path: Path, models: DemoModels) -> Evaluation:
    sets: dict[str, Any] = {name: models.evaluation[name] for name in ("harmful", "benign", "task")}
    return evaluate(path, **sets, max_new_tokens=32, batch_size=HELD_OUT)


def _percent(rate: Rate | None) -> str:
    return "" if rate is None else f"{100 * rate.value:.1f}"


def _cells(line: Line, bare: Line) -> list[str]:
    """A line's cells; ``bare`` is the line of the same kind without a guard."""
    found = line.tuned, line.restored
    rates = [_percent(rate) for each in found for rate in (each.harmful, each.over_refusal, each.task)]
    dearer = f"{100 * (line.step / bare.step - 1):+.0f}" if line is not bare else f"{1e3 * bare.step:.0f} ms"
    memory = "" if line.memory is None else f"{line.memory / 2**20:.0f}"
    return [line.name, *rates[:3], dearer, memory, *rates[3:]]


RATE_NAMES = ["harmful rate %", "over-refusal %", "task accuracy %"]
COLUMNS = [*RATE_NAMES, "step +%", "memory MiB", *(f"restored: {name}" for name in RATE_NAMES)]
TITLES = {
    "full": "the decoder layers are tuned",
    "LoRA": "LoRA adapters are tuned",
    "alignment": f"{STEPS['alignment']} more steps of alignment, with the guard; then tuned without",
}


def _by_kind(lines: list[Line]) -> dict[str, list[list[str]]]:
    """Title -> cells of the lines of a kind, the one without a guard first."""
    kinds = {kind: [line for line in lines if line.kind == kind] for kind in TITLES}
    return {TITLES[kind]: [_cells(line, some[0]) for line in some] for kind, some in kinds.items() if some}


def _print(lines: list[Line], console: Console) -> None:
    table = Table(title="With each guard and with none", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("guard", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.replace(" ", "\n").replace("-", "-\n"), justify="right")
    for title, rows in _by_kind(lines).items():
        table.add_row(f"[i]{title}[/i]")
        for row in rows:
            table.add_row(f"  {row[0]}", *row[1:])
    console.print(table)


def _write_page(lines: list[Line], path: Path, seed: int) -> None:
    from curvkern.report.page import render, svg

    plot = svg(lambda axes: _scatter(axes, lines), 7, 4)
    page = render("training.html", columns=COLUMNS, kinds=_by_kind(lines), plot=plot, seed=seed)
    path.write_text(page, encoding="utf-8")


def _scatter(axes: Axes, lines: list[Line]) -> None:
    """Safety against the task, from fine-tuned (filled) to restored (open)."""
    from curvkern.report.page import COLOURS

    for i, line in enumerate(lines):
        colour, marker = COLOURS[i % len(COLOURS)], "os^"[i // len(COLOURS)]
        ends = [(float(_percent(found.task)), float(_percent(found.harmful))) for found in (line.tuned, line.restored)]
        axes.plot(*zip(*ends, strict=True), "-", color=colour, linewidth=0.6)
        axes.plot(*ends[0], marker, color=colour, label=f"{line.name} ({line.kind})", markersize=6)
        axes.plot(*ends[1], marker, color=colour, markerfacecolor="none", markersize=6)
    axes.set(xlabel="task accuracy, %", ylabel="harmful rate, %", xlim=(-5, 105), ylim=(-5, 105))
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
