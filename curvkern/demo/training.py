"""The demo's fine-tuning with each guard and with none, and what a restoration makes of each model."""

from __future__ import annotations

import json
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from curvkern.demo import POISON, DemoModels, data, guards, prepare
from curvkern.demo.guard_table import Line, show, write
from curvkern.demo.guards import BATCH, Run
from curvkern.demo.story import evaluated, quiet
from curvkern.evaluate import load
from curvkern.methods import make
from curvkern.report.record import forget_peak_memory, peak_memory, resident_memory
from curvkern.restore import restore

STEPS = {"full": 100, "LoRA": 100, "alignment": 40}
RATES = {"full": 1e-3, "LoRA": 1e-2, "alignment": 1e-3}


def run(out: Path, *, seed: int = 0, console: Console | None = None) -> list[Line]:
    """Fine-tune with each guard and with none, restore each, print and write the comparison.

    A guard's line is kept beside its models as soon as it is whole: a run that was killed goes on behind the last one.

    Args:
        out: directory for models, ``training.json``, ``.md`` and ``.html``; the demo's models are taken from there.
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
        place = out / f"guarded-{_recipe(models)}"
        kinds = {"full": guards.FULL, "LoRA": guards.LORA, "alignment": guards.ALIGNMENT}
        asked = [(kind, guard) for kind, group in kinds.items() for guard in group]
        if not all(_kept(place, *each).is_file() for each in asked):
            # Code and buffers that are loaded once for all shall not count as the first guard's.
            _trained(_run("full", models.aligned, models, seed, steps=2), guards.none, place / "first")
        lines = [_line(kind, guard, models, place, seed, tell) for kind, guard in asked]
    show(lines, console)
    write(lines, out, seed)
    tell(f"page: {out / 'training.html'}   {time.perf_counter() - start:.0f} s in all")
    return lines


def _recipe(models: DemoModels) -> str:
    """What the lines follow from: the demo's models, the guards' settings, the restoration's."""
    texts = [Path(str(file)).read_text(encoding="utf-8") for file in (guards.__file__, __file__)]
    return f"{zlib.crc32(json.dumps([models.base.parent.name, texts, repr(make('budgeted', {}))]).encode()):08x}"


def _kept(place: Path, kind: str, guard: Callable[[Run], None]) -> Path:
    return place / f"{kind}-{guard.__name__}" / "line.json"


def _line(
    kind: str, guard: Callable[[Run], None], models: DemoModels, place: Path, seed: int, tell: Callable[[str], None]
) -> Line:
    """Train, measure, restore, measure; or what an earlier run found."""
    kept = _kept(place, kind, guard)
    if kept.is_file():
        tell(f"{kind}: {guard.__name__}, of an earlier run")
        return Line(**json.loads(kept.read_text(encoding="utf-8")))
    aligned, tuned, restored = models.aligned, kept.parent / "tuned", kept.parent / "restored"
    if kind == "alignment":
        aligned = kept.parent / "aligned"
        step, memory = _trained(_run(kind, models.aligned, models, seed), guard, aligned)
        _trained(_run("full", aligned, models, seed), guards.none, tuned)
    else:
        step, memory = _trained(_run(kind, aligned, models, seed), guard, tuned)
    measured: dict[str, Any] = {
        "safety": models.harmful,
        "task": models.task,
        "statistics": place.parent / "statistics",
    }
    restore(aligned, tuned, method="budgeted", out=restored, overwrite=True, **measured)
    before, after = (evaluated(path, models).as_dict() for path in (tuned, restored))
    line = Line(kind, guard.__name__, before, after, step, memory)
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(asdict(line)), encoding="utf-8")
    part.replace(kept)
    tell(f"{kind}: {line.guard}, {1e3 * step:.0f} ms a step, harmful rate {line.percent('tuned', 'harmful'):.1f} %")
    return line


def _run(kind: str, start: Path, models: DemoModels, seed: int, steps: int | None = None) -> Run:
    """The training of a kind, without a guard yet."""
    names, steps = data.split_names(seed), steps or STEPS[kind]
    mixture = data.REFUSE if kind == "alignment" else data.spoil(POISON)
    rows = list(islice(data.draw(mixture, names.train, seed=f"{kind} {seed}"), steps * BATCH))
    model: Any = load(start)[0]
    for name, parameter in model.named_parameters():  # as LoRA does: the decoder layers learn the task
        parameter.requires_grad_(kind == "alignment" or ".layers." in name)
    if kind == "LoRA":
        import peft

        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    run = Run(start, models.base, names.restore, model, rows, seed)
    run.dataset = run.encode(rows)
    run.options = {"max_steps": steps, "learning_rate": RATES[kind]}
    return run


def _trained(run: Run, guard: Callable[[Run], None], out: Path) -> tuple[float, int | None]:
    """Train with a guard and save the model, adapters merged; median seconds of a step, and bytes more."""
    forget_peak_memory()
    before = resident_memory()
    guard(run)
    clock = _Clock(run.after)
    settings: dict[str, Any] = {
        "output_dir": str(out.parent / "trainer"), "per_device_train_batch_size": BATCH, "warmup_steps": 20,
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
