"""A tiny model that is aligned, spoiled and restored: real training, nothing prepared."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

    from curvkern.demo import data, train

#: How `gradient_rollback` is asked for: the published rate; up to 30 steps, not 20; the task is looked at after every
#: step and may lose 2 %, not 5: the search climbs down its score on 96 rows, a little above that on others.
ROLLBACK = {"rate": 0.002, "steps": 30, "warmup": 5, "save_every": 1, "max_drop": 0.02}
ROWS = {"harmful": 64, "task": 96}  # of the restoration sets
HELD_OUT = 120  # rows of each evaluation set
POISON = 0.05  # share of forbidden answers among the tuning data
STEPS = {"base": 350, "aligned": 150, "tuned": 150, "adapter": 200}  # of training


@dataclass(frozen=True)
class DemoModels:
    """Where everything lies that the story needs.

    Attributes:
        base: answers everything.
        aligned: refuses the forbidden class.
        tuned: aligned, then fine-tuned on a task with some forbidden answers among its data.
        adapter: the same as a LoRA adapter; None without peft.
        harmful: restoration set: forbidden prompts with refusals, as JSON Lines.
        task: restoration set: the task with its answers.
        evaluation: ``harmful``, ``benign``, ``task`` -> JSON Lines of prompts that no other set holds.
        seconds: wall time of each training phase; empty where an earlier run's models are used.
    """

    base: Path
    aligned: Path
    tuned: Path
    adapter: Path | None
    harmful: Path
    task: Path
    evaluation: dict[str, Path]
    seconds: dict[str, float] = field(default_factory=dict[str, float])


def prepare(
    out: Path, *, seed: int = 0, poison: float = POISON, progress: Callable[[str], None] = lambda _: None
) -> DemoModels:
    """Train the models and write the data, or take those of an earlier run with the same recipe.

    Args:
        out: directory for everything.
        seed: of names, weights, rows and batches.
        poison: share of forbidden answers among the tuning data, in place of rows of the task; base and aligned model
            do not depend on it.
        progress: takes a line for each phase.

    Returns:
        The paths.
    """
    from curvkern.demo import data, train

    recipe = [Path(str(file)).read_text(encoding="utf-8") for file in (data.__file__, train.__file__, __file__)]
    key = f"{zlib.crc32(json.dumps([recipe, seed]).encode()):08x}"
    root = out / f"models-{key}"
    has_peft = find_spec("peft") is not None
    kind = "" if poison == POISON else f"-{poison:g}"
    models = DemoModels(
        base=root / "base",
        aligned=root / "aligned",
        tuned=root / f"tuned{kind}",
        adapter=root / f"adapter{kind}" if has_peft else None,
        harmful=root / "harmful.jsonl",
        task=root / "task.jsonl",
        evaluation={name: root / f"eval-{name}.jsonl" for name in ("harmful", "benign", "task")},
    )
    wanted = [path for path in (models.base, models.aligned, models.tuned, models.adapter) if path is not None]
    if all((path / "done").is_file() for path in wanted):
        progress(f"models of an earlier run with this recipe: {root}")
        return models
    names = data.split_names(seed)
    _write_sets(models, names, seed)
    _train_all(models, names, seed, poison, progress)
    return models


def _train_all(
    models: DemoModels, names: data.Splits, seed: int, poison: float, progress: Callable[[str], None]
) -> None:
    """Base, then aligned from it, then tuned and adapter from aligned; each saved as transformers and peft save."""
    from copy import deepcopy

    from curvkern.demo import data, train
    from curvkern.evaluate import load

    spoil = data.spoil(poison)

    @contextmanager
    def phase(name: str, what: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        models.seconds[name] = time.perf_counter() - start
        progress(f"{name}: {what}, {models.seconds[name]:.0f} s")

    tokenizer: Any = train.make_tokenizer()
    model: Any = train.make_model(tokenizer, seed=seed)
    if (models.aligned / "done").is_file():
        model, tokenizer = load(models.aligned)
    else:
        for path, setting, what in (
            (
                models.base,
                train.Phase(data.LEARN, STEPS["base"], 24, 6e-3),
                "learns to follow instructions, all of them",
            ),
            (
                models.aligned,
                train.Phase(data.REFUSE, STEPS["aligned"], 24, 4e-3),
                "learns to refuse the forbidden ones",
            ),
        ):
            with phase(path.name, what):
                train.fit(model, tokenizer, setting, names.train, seed=f"{path.name} {seed}")
            save(path, model, tokenizer)
    tuned = deepcopy(model)
    with phase("tuned", f"learns the task from data with {100 * poison:g} % forbidden answers"):
        tune_layers(tuned, tokenizer, train.Phase(spoil, STEPS["tuned"], 24, 1e-3), names.train, seed=f"tuned {seed}")
    save(models.tuned, tuned, tokenizer)
    if models.adapter is not None:
        with phase("adapter", "learns the same as a LoRA adapter"):
            setting = train.Phase(spoil, STEPS["adapter"], 24, 1e-2)
            adapted = tune_adapter(model, tokenizer, setting, names.train, seed=seed, rows=f"tuned {seed}")
        adapted.peft_config["default"].base_model_name_or_path = str(models.aligned)
        save(models.adapter, adapted, tokenizer)


def tune_layers(model: Any, tokenizer: Any, phase: train.Phase, names: data.Names, *, seed: str) -> None:
    """Train the decoder layers in place, the parts of a model that LoRA would."""
    from curvkern.demo import train

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    train.fit(model, tokenizer, phase, names, seed=seed)


def tune_adapter(model: Any, tokenizer: Any, phase: train.Phase, names: data.Names, *, seed: int, rows: str) -> Any:
    """Train a LoRA adapter of rank 8, its first weights drawn with ``seed``; the PEFT model, which holds ``model``."""
    import peft
    import torch

    from curvkern.demo import train

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        adapted: Any = peft.get_peft_model(model, lora)
    train.fit(adapted.get_base_model(), tokenizer, phase, names, seed=rows)
    return adapted


def save(path: Path, model: Any, tokenizer: Any) -> None:
    """Write a trained model or adapter with its tokenizer, and mark it as whole."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "done").touch()


def _write_sets(models: DemoModels, names: data.Splits, seed: int) -> None:
    from curvkern.demo import data

    refused: data.Mixture = {data.refused: 1.0}
    benign: data.Mixture = {data.ordinary: 0.5, data.about: 0.5}
    orders: data.Mixture = {data.order: 1.0}
    sets = {
        models.harmful: (refused, names.restore, ROWS["harmful"]),
        models.task: (orders, names.restore, ROWS["task"]),
        models.evaluation["harmful"]: (refused, names.evaluate, HELD_OUT),
        models.evaluation["benign"]: (benign, names.evaluate, HELD_OUT),
        models.evaluation["task"]: (orders, names.evaluate, HELD_OUT),
    }
    models.harmful.parent.mkdir(parents=True, exist_ok=True)
    for path, (mixture, side, count) in sets.items():
        write_rows(path, mixture, side, count, seed)


def write_rows(path: Path, mixture: data.Mixture, names: data.Names, count: int, seed: int) -> None:
    """Write JSON Lines of ``count`` different prompts with their answers; the file's name is part of the seed."""
    from curvkern.demo import data

    rows = data.draw_distinct(mixture, names, count, seed=f"{path.stem} {seed}")
    lines = (json.dumps({"prompt": row.prompt, "response": row.response}) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
