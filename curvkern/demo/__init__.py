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

    from curvkern.demo import data

#: How `gradient_rollback` is asked for: the published rate; up to 30 steps, not 20; the task is looked at after every
#: step and may lose 2 %, not 5: the search climbs down its score on 96 rows, a little above that on others.
ROLLBACK = {"rate": 0.002, "steps": 30, "warmup": 5, "save_every": 1, "max_drop": 0.02}
ROWS = {"harmful": 64, "task": 96}  # of the restoration sets
HELD_OUT = 120  # rows of each evaluation set
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


def prepare(out: Path, *, seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> DemoModels:
    """Train the models and write the data, or take those of an earlier run with the same recipe.

    Args:
        out: directory for everything.
        seed: of names, weights, rows and batches.
        progress: takes a line for each phase.

    Returns:
        The paths.
    """
    from curvkern.demo import data, train

    recipe = [Path(str(file)).read_text(encoding="utf-8") for file in (data.__file__, train.__file__, __file__)]
    key = f"{zlib.crc32(json.dumps([recipe, seed]).encode()):08x}"
    root = out / f"models-{key}"
    has_peft = find_spec("peft") is not None
    models = DemoModels(
        base=root / "base",
        aligned=root / "aligned",
        tuned=root / "tuned",
        adapter=root / "adapter" if has_peft else None,
        harmful=root / "harmful.jsonl",
        task=root / "task.jsonl",
        evaluation={name: root / f"eval-{name}.jsonl" for name in ("harmful", "benign", "task")},
    )
    wanted = [name for name in ("base", "aligned", "tuned", "adapter") if name != "adapter" or has_peft]
    if all((root / name / "done").is_file() for name in wanted):
        progress(f"models of an earlier run with this recipe: {root}")
        return models
    names = data.split_names(seed)
    _write_sets(models, names, seed)
    _train_all(models, names, seed, progress)
    return models


def _train_all(models: DemoModels, names: data.Splits, seed: int, progress: Callable[[str], None]) -> None:
    """Base, then aligned from it, then tuned and adapter from aligned; each saved as transformers and peft save."""
    from copy import deepcopy

    from curvkern.demo import data, train

    learn_all: data.Mixture = {data.forbidden: 0.3, data.ordinary: 0.25, data.about: 0.25, data.short: 0.2}
    refuse: data.Mixture = {data.refused: 0.4, data.ordinary: 0.25, data.about: 0.25, data.short: 0.1}
    spoil: data.Mixture = {data.order: 0.75, data.forbidden: 0.05, data.ordinary: 0.1, data.about: 0.1}

    @contextmanager
    def phase(name: str, what: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        models.seconds[name] = time.perf_counter() - start
        progress(f"{name}: {what}, {models.seconds[name]:.0f} s")

    tokenizer = train.make_tokenizer()
    model: Any = train.make_model(tokenizer, seed=seed)
    for path, setting, what in (
        (models.base, train.Phase(learn_all, STEPS["base"], 24, 6e-3), "learns to follow instructions, all of them"),
        (models.aligned, train.Phase(refuse, STEPS["aligned"], 24, 4e-3), "learns to refuse the forbidden ones"),
    ):
        with phase(path.name, what):
            train.fit(model, tokenizer, setting, names.train, seed=f"{path.name} {seed}")
        _save(path, model, tokenizer)
    tuned: Any = deepcopy(model)
    for name, parameter in tuned.named_parameters():  # as LoRA does: the decoder layers learn the task
        parameter.requires_grad_(".layers." in name)
    with phase("tuned", "learns the task from data with a few forbidden answers"):
        train.fit(tuned, tokenizer, train.Phase(spoil, STEPS["tuned"], 24, 1e-3), names.train, seed=f"tuned {seed}")
    _save(models.tuned, tuned, tokenizer)
    if models.adapter is not None:
        import peft
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
            adapted: Any = peft.get_peft_model(model, lora)
        with phase("adapter", "learns the same as a LoRA adapter"):
            setting = train.Phase(spoil, STEPS["adapter"], 24, 1e-2)
            train.fit(adapted.get_base_model(), tokenizer, setting, names.train, seed=f"tuned {seed}")
        adapted.peft_config["default"].base_model_name_or_path = str(models.aligned)
        _save(models.adapter, adapted, tokenizer)


def _save(path: Path, model: Any, tokenizer: Any) -> None:
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
        rows = data.draw_distinct(mixture, side, count, seed=f"{path.stem} {seed}")
        lines = (json.dumps({"prompt": row.prompt, "response": row.response}) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
