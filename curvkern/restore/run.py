"""The restoration pass: open checkpoints, gather evidence, plan, edit module by module, write, report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvkern.restore.evidence import (
    EditAtOnce,
    ModuleStatistics,
    Score,
    gather_statistics,
    given,
    hidden_evidence,
    scratch_beside,
)
from curvkern.restore.part import Part
from curvkern.restore.recipe import CHECKPOINTS, DATA, Recipe, make_recipe
from curvkern.restore.scope import RestoreError
from curvkern.restore.stream import PlannedModules, Stream
from curvkern.trace import span, tracing

if TYPE_CHECKING:
    from curvkern.checkpoint import AdapterWriter, Bundle, DeltaWriter, Writer
    from curvkern.methods import Edit, Method, Module, Need
    from curvkern.ops import Change
    from curvkern.report import ModuleChange, Report

    AnyWriter = Writer | AdapterWriter | DeltaWriter


def restore(
    aligned: str | Path,
    tuned: str | Path,
    *,
    out: str | Path,
    method: str,
    base: str | Path | None = None,
    unaligned: str | Path | None = None,
    safety_adapter: str | Path | None = None,
    harmful: str | Path | None = None,
    safety: str | Path | None = None,
    task: str | Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    save: str = "auto",
    statistics: str | Path | None = None,
    device: str = "cpu",
    memory_budget: int | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    trace: str | Path | None = None,
    score: Score | None = None,
    **parameters: Any,
) -> Report:
    """Restore a fine-tuned model's safety from the aligned model it came from, and write the result.

    Args:
        aligned: the safe chat model: a Hugging Face directory, a file, or a hub id in the local cache.
        tuned: what fine-tuning made of it: likewise, or a LoRA adapter directory.
        out: directory to make: a checkpoint (or adapter) with ``curvkern.json``, ``report.json``, ``report.html``.
        method: a name of `curvkern.methods.REGISTRY`.
        base: the model before alignment, where the method needs it.
        unaligned: an aligned model broken on purpose, where the method needs it.
        safety_adapter: the aligned model tuned on safety data, adapter or checkpoint, where the method needs it.
        harmful: JSON Lines of harmful prompts, where the method needs them; with harmful responses if it asks for them.
        safety: JSON Lines of harmful prompts with safe responses, where the method needs them.
        task: JSON Lines of the fine-tuning task with responses, where the method needs it.
        include: patterns (``*``, ``?``) on full weight names; empty: the linear modules of all decoder layers.
        exclude: patterns of modules to leave as tuned.
        save: ``"checkpoint"``, ``"adapter"`` (the tuned model is one and the method can edit it), ``"delta"`` (what
            differs from a tuned checkpoint, see `curvkern.checkpoint.apply_delta`), ``"auto"``.
        statistics: directory of curvature statistics: those that fit are loaded, what is estimated is saved there.
        device: where tensors are edited and the model runs.
        memory_budget: bytes on the device that a model and what is measured of it may take, or ``"20GiB"``; where that
            is too little, the model runs layer by layer, with the same result. Default: what is free.
        overwrite: replace what is at ``out``, once the new checkpoint is whole.
        resume: go on where a killed run with the same recipe and inputs stopped.
        progress: show a progress bar.
        trace: JSON file to write for chrome://tracing or Perfetto; the report then says what the pass waited for.
        score: task score of (model, tokenizer), higher is better; default: exact match of greedy answers on ``task``.
        **parameters: the method's own.

    Returns:
        What changed, per module and stage.

    Raises:
        RecipeError, MethodError, CheckpointError, FileNotFoundError, ValueError: inputs that are wrong or do not fit;
            before any heavy work, and nothing is written.
        RestoreError: the recipe does not fit the checkpoints, or the method made a non-finite weight of finite ones.
    """
    values = {key: value for key, value in locals().items() if key in _RECIPE_KEYS}
    recipe = make_recipe({**values, "parameters": parameters})
    return run_recipe(recipe, overwrite=overwrite, resume=resume, progress=progress, trace=trace, score=score)


_RECIPE_KEYS = frozenset(
    {"aligned", "tuned", "out", "method", *CHECKPOINTS, *DATA, "include", "exclude", "save", "statistics", "device"}
    | {"memory_budget"}
)


def run_recipe(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    trace: str | Path | None = None,
    score: Score | None = None,
) -> Report:
    """`restore`, from a `Recipe`."""
    return run_recipes([recipe], overwrite=overwrite, resume=resume, progress=progress, trace=trace, score=score)[0]


def run_recipes(
    recipes: Sequence[Recipe],
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    trace: str | Path | None = None,
    score: Score | None = None,
) -> list[Report]:
    """`restore`, from recipes that differ in method, parameters and ``out`` alone, such as those of `each_method`.

    Statistics are estimated once for all, and a module is read once for all to edit it; planning is each method's own.
    The outputs are those of single runs, bit for bit.
    """
    from curvkern.checkpoint import Bundle, Checkpoint, open_tuned
    from curvkern.methods import make

    parts = [Part(recipe, make(recipe.method, recipe.parameters)) for recipe in recipes]
    recipe, needs = recipes[0], frozenset[str]().union(*(part.method.needs for part in parts))
    _check_device(recipe.device)
    with ExitStack() as stack:
        traced = stack.enter_context(tracing(trace))
        with _shared(parts, "open"):
            aligned = stack.enter_context(Checkpoint.open(recipe.aligned))
            tuned = stack.enter_context(open_tuned(recipe.tuned, aligned))
            if "model" in needs:
                aligned.require_config()
            sources: dict[str, Any] = {"aligned": aligned, "tuned": tuned}
            for role in CHECKPOINTS:
                if role in needs:
                    sources[role] = stack.enter_context(open_tuned(given(recipe, role), aligned))
            bundle = Bundle(sources, device=recipe.device)
            for part in parts:
                stack.enter_context(part.open(bundle, overwrite=overwrite, resume=resume, score=score))
        scratch = stack.enter_context(scratch_beside(recipe.out))
        stream = Stream(bundle, ModuleStatistics(), recipe.memory_budget, progress)
        if asking := [part for part in parts if part.needs]:
            with _shared(asking, "statistics"):
                stream.known = _gather(asking, bundle, scratch, progress, _at_once(parts, bundle))
        for part in parts:
            _plan(part, stream, scratch, score)
        with _shared(parts, "edit"):
            _edit_all(parts, stream, bundle.names)
        for part in parts:
            with part.stages.stage("finish"):
                part.writer.copy_rest()
            if traced is not None:
                part.messages.append(traced.limit(aligned.directory / aligned.files[0], recipe.device))
        return [part.finish() for part in parts]


@contextmanager
def _shared(parts: Sequence[Part], name: str) -> Generator[None]:
    """A stage that several parts go through together."""
    from curvkern.report import Stages

    stages = Stages()
    with stages.stage(name):
        yield
    for part in parts:
        part.stages.done.extend(stages.done)


def _gather(
    parts: Sequence[Part], bundle: Bundle, scratch: Path, progress: bool, edit: EditAtOnce | None
) -> ModuleStatistics:
    needs = dict.fromkeys(need for part in parts for need in part.needs)
    data = {role: rows for part in parts for role, rows in part.data.items()}
    chosen = {name for part in parts for name in part.names}
    names = [name for name in bundle.names if name in chosen]

    def tell(line: str) -> None:
        for part in parts:
            part.messages.append(line)

    return gather_statistics(
        parts[0].recipe, tuple(needs), data, bundle, names,
        scratch=scratch, progress=progress, tell=tell, edit=edit,
        again=any(part.method.measures_again for part in parts), taken=sum(part.bits for part in parts),
    )  # fmt: skip


def _at_once(parts: Sequence[Part], bundle: Bundle) -> EditAtOnce | None:
    """What edits a layer when its backward ends: of one method that needs no plan, if no statistics are to be kept."""
    part = parts[0]
    if len(parts) > 1 or part.method.plans or part.recipe.statistics is not None or part.saved != "checkpoint":
        return None

    def edit(names: Sequence[str], known: ModuleStatistics, room: int) -> None:
        _edit_all(parts, Stream(bundle, known, room, progress=False), names)

    return EditAtOnce(part.working, edit)


def _plan(part: Part, stream: Stream, scratch: Path, score: Score | None) -> None:
    evidence = None
    if "model" in part.method.needs:
        with part.stages.stage("evidence"):
            evidence = hidden_evidence(part.recipe, part.method, part.data, stream.bundle, score)
    with part.stages.stage("plan"):
        part.plan = part.method.plan(PlannedModules(part, stream, scratch), evidence, part.messages.append)


def _check_device(device: str) -> None:
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise RestoreError(f"restore: device is {device!r}; wanted cpu, cuda, cuda:1 and the like.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RestoreError(f"restore: device is {device!r}, but torch sees no GPU here; `curvkern env` says more.")


def _edit_all(parts: Sequence[Part], stream: Stream, names: Collection[str]) -> None:
    """Edit those modules of ``names`` that are not restored yet, and copy what lies between them.

    Everything goes in file order, so that shards become complete, and are kept for a resumed run, one by one.
    """
    wanted: defaultdict[str, set[Need]] = defaultdict(set)
    for part in parts:
        for name in part.left.intersection(names):
            wanted[name].update(part.needs)
    working = sum(part.working for part in parts)
    with closing(stream.modules("restoring", wanted, working)) as modules:
        for module in modules:
            for part in parts:
                if module.name in part.left:
                    part.copy_before(module.name)
                    part.changes[module.name] = _edit_one(part.method, part.plan, module, part.writer)
            del module  # before the next one is read


def _edit_one(method: Method, plan: Any, module: Module, writer: AnyWriter) -> ModuleChange:
    """Edit, check, measure and write one module."""
    from curvkern.checkpoint import DeltaWriter, Writer
    from curvkern.ops import Change, change
    from curvkern.report import record_change

    with span(module.name, "compute", bytes=3 * module.tuned.nbytes):
        edit = method.edit(module, plan)
        weight = module.tuned if edit.weight is None else edit.weight
        stored = weight.to(module.tuned.dtype)
        found = Change.of(change(module.aligned, module.tuned, stored))
    if found.spread:
        raise RestoreError(
            f"restore: {method.name} made {found.spread} non-finite weights of finite ones in {module.name}; nothing "
            "is written. Look for NaN or Inf in the inputs or for an overflow of its dtype."
        )
    wanted = _wanted(edit, module, found)
    size = module.tuned.numel()
    done = record_change(module.name, module.layer, module.kind, size, found, wanted=wanted, notes=edit.notes)
    if isinstance(writer, Writer):
        writer.write(module.name, stored.contiguous(), asdict(done))
    elif isinstance(writer, DeltaWriter):
        writer.write(module.name, stored, module.tuned)
    elif edit.factors is not None:
        writer.write(module.name, *edit.factors, asdict(done))
    return done


_ROWS = 256  # as many at once need no memory to speak of


def _wanted(edit: Edit, module: Module, found: Change) -> int:
    """How many weights the method meant to change, before rounding to the checkpoint's dtype."""
    if edit.selected is not None:
        return found.differing if edit.selected == "all" else edit.selected
    if edit.weight is None:
        return 0
    rows = zip(edit.weight.split(_ROWS), module.tuned.split(_ROWS), strict=True)
    return sum(int((new.float() != old.float()).sum()) for new, old in rows)
