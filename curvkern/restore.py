"""The restoration pass: open checkpoints, gather evidence, plan, edit module by module, write, report."""

from __future__ import annotations

import math
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvkern.evidence import (
    ModuleStatistics,
    Score,
    data_files,
    gather_statistics,
    given,
    hidden_evidence,
    looked_at,
    read_ahead,
    read_data,
    scratch_beside,
)
from curvkern.progress import bar
from curvkern.recipe import CHECKPOINTS, DATA, Recipe, make_recipe
from curvkern.scope import RestoreError, layer_of, select_modules

if TYPE_CHECKING:
    from curvkern.checkpoint import Adapter, AdapterWriter, Bundle, Writer
    from curvkern.methods import Edit, Method, Module
    from curvkern.ops import Change
    from curvkern.report import ModuleChange, Report


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
        save: ``"checkpoint"``, ``"adapter"`` (the tuned model is one and the method can edit it), ``"auto"``.
        statistics: directory of curvature statistics: those that fit are loaded, what is estimated is saved there.
        device: where tensors are edited and the model runs.
        memory_budget: bytes on the device that a model and what is measured of it may take, or ``"20GiB"``; where that
            is too little, the model runs layer by layer, with the same result. Default: what is free.
        overwrite: replace what is at ``out``, once the new checkpoint is whole.
        resume: go on where a killed run with the same recipe and inputs stopped.
        progress: show a progress bar.
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
    return run_recipe(recipe, overwrite=overwrite, resume=resume, progress=progress, score=score)


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
    score: Score | None = None,
) -> Report:
    """`restore`, from a `Recipe`."""
    from curvkern.checkpoint import AdapterWriter, Bundle, Checkpoint, Writer, as_json, open_tuned, plain
    from curvkern.methods import make
    from curvkern.report import Report, Stages, render_page

    method = make(recipe.method, recipe.parameters)
    _check_device(recipe.device)
    data = read_data(recipe, method)
    stages = Stages()
    messages = [f"{method.name} does not look at {name}" for name in _unused(recipe, method)]
    with ExitStack() as stack:
        with stages.stage("open"):
            aligned = stack.enter_context(Checkpoint.open(recipe.aligned))
            tuned = stack.enter_context(open_tuned(recipe.tuned, aligned))
            if "model" in method.needs:
                aligned.require_config()
            sources: dict[str, Any] = {"aligned": aligned, "tuned": tuned}
            for role in CHECKPOINTS:
                if role in method.needs:
                    sources[role] = stack.enter_context(open_tuned(given(recipe, role), aligned))
            bundle = Bundle(sources, device=recipe.device, max_bytes=read_ahead(recipe))
            shapes = {name: tuned.spec(name).shape for name in bundle.names}
            names = select_modules(shapes, method, recipe, tuned.config)
            messages += _told_of(shapes, names, bundle)
            adapter = tuned.adapter if _saves_adapter(recipe, method, tuned.adapter, names) else None
            options: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "inputs": sources}
            options |= {"recipe": _resolved(recipe, method, score), "data": data_files(recipe, method)}
            if adapter is None:
                tuned.require_config()
                writer = stack.enter_context(Writer(recipe.out, tuned, **options))
            else:
                writer = stack.enter_context(AdapterWriter(recipe.out, adapter, **options))
        known = ModuleStatistics()
        if method.statistics():
            scratch = stack.enter_context(scratch_beside(recipe.out))
            with stages.stage("statistics"):
                known = gather_statistics(
                    recipe, method, data, bundle, names, scratch=scratch, progress=progress, tell=messages.append
                )
        sweep = _Sweeps(bundle, names, known, progress)
        evidence = None
        if "model" in method.needs:
            with stages.stage("evidence"):
                evidence = hidden_evidence(recipe, method, data, bundle, score)
        with stages.stage("plan"):
            plan = method.plan(lambda: sweep.modules("planning"), evidence, messages.append)
        del evidence  # the model in memory
        with stages.stage("edit"):
            changes = list(_edit_all(method, plan, sweep, writer))
        with stages.stage("finish"):
            writer.copy_rest()
        report = Report(
            method=method.name,
            source=method.source,
            recipe=recipe.record(),
            out=str(recipe.out.expanduser()),
            saved="checkpoint" if adapter is None else "adapter",
            modules=changes,
            stages=stages.done,
            messages=messages,
        )
        told = plain(report.as_dict())
        files = {"report.json": as_json(told), "report.html": render_page(report)}
        writer.finish({"restoration": told}, extra_files=files)
    return report


def _resolved(recipe: Recipe, method: Method, score: Score | None) -> dict[str, Any]:
    """The recipe with every parameter of the method, defaults too: what a resumed run must agree with."""
    name = getattr(score, "__qualname__", type(score).__qualname__)
    own = {} if score is None else {"score": name}
    return {**recipe.record(), "parameters": method.model_dump(mode="json"), **own}


def _told_of(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], bundle: Bundle) -> list[str]:
    """What a reader of the report should know of the inputs."""
    lines: list[str] = []
    fused = [name for name, shape in shapes.items() if len(shape) == 3 and layer_of(name) is not None]
    if fused:
        weights = sum(math.prod(shapes[name]) for name in fused)
        lines.append(f"left as tuned: {len(fused)} fused expert tensors with {weights:,} weights, such as {fused[0]}")
    dtypes = [{role: source.spec(name).dtype for role, source in bundle.sources.items()} for name in names]
    if mixed := [found for found in dtypes if found["aligned"] != found["tuned"]]:
        aligned, tuned = (str(mixed[0][role]).removeprefix("torch.") for role in ("aligned", "tuned"))
        lines.append(f"{len(mixed)} modules are {aligned} in aligned and {tuned} in tuned: what is restored is {tuned}")
    return lines


def _check_device(device: str) -> None:
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise RestoreError(f"restore: device is {device!r}; wanted cpu, cuda, cuda:1 and the like.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RestoreError(f"restore: device is {device!r}, but torch sees no GPU here; `curvkern env` says more.")


def _unused(recipe: Recipe, method: Method) -> list[str]:
    return [name for name in (*CHECKPOINTS, *DATA) if getattr(recipe, name) and name not in looked_at(method)]


def _saves_adapter(recipe: Recipe, method: Method, adapter: Adapter | None, names: Sequence[str]) -> bool:
    whole = [name for name in names if adapter is not None and name in adapter.replaced]
    why = None
    if adapter is None:
        why = "the tuned model is not an adapter"
    elif not method.edits_adapter():
        why = f"{method.name} edits full weights"
    elif whole:
        why = f"the adapter holds {whole[0]} and {len(whole) - 1} more whole, without factors to edit; exclude them"
    if why is not None and recipe.save == "adapter":
        raise RestoreError(f"restore: cannot save an adapter: {why}; use save='checkpoint'.")
    return why is None and recipe.save != "checkpoint"


class _Sweeps:
    """Streams the selected modules, as often as asked."""

    def __init__(self, bundle: Bundle, names: Sequence[str], known: ModuleStatistics, progress: bool) -> None:
        self.bundle = bundle
        self.names = names
        self.selected = frozenset(names)
        self.known = known
        self.progress = progress

    def modules(self, what: str, skip: Container[str] = ()) -> Generator[Module]:
        """One sweep in file order."""
        from curvkern.methods import Module

        names = [name for name in self.names if name not in skip]
        with bar(what, len(names), self.progress) as advance:
            for done, (name, tensors) in enumerate(self.bundle.stream(names), 1):
                layer = layer_of(name) or 0
                advance(done, f"{what}: layer {layer}")
                yield Module(
                    name=name,
                    layer=layer,
                    kind=name.rsplit(".", 2)[-2],
                    tuned=tensors["tuned"],
                    aligned=tensors["aligned"],
                    base=tensors.get("base"),
                    unaligned=tensors.get("unaligned"),
                    safety_adapter=tensors.get("safety_adapter"),
                    factors=self._factors("tuned", name, tensors["tuned"]),
                    safety_factors=self._factors("safety_adapter", name, tensors["tuned"]),
                    statistics=self.known.of(name),
                )

    def _factors(self, role: str, name: str, beside: Tensor) -> tuple[Tensor, Tensor, float] | None:
        adapter = getattr(self.bundle.sources.get(role), "adapter", None)
        # Beside a tensor that the adapter holds whole, factors are not all that it changes.
        if adapter is None or name not in adapter.names or name in adapter.replaced:
            return None
        factors = adapter.factors(name)
        return factors.B.to(beside.device), factors.A.to(beside.device), factors.scale


def _edit_all(method: Method, plan: Any, sweep: _Sweeps, writer: Writer | AdapterWriter) -> Iterator[ModuleChange]:
    """Edit every selected module that an earlier run has not finished, and copy what lies between them.

    Everything goes in file order, so that shards become complete, and are kept for a resumed run, one by one.
    """
    from curvkern.checkpoint import Writer
    from curvkern.report import ModuleChange

    earlier, last = writer.notes, sweep.names[-1]
    with closing(sweep.modules("restoring", earlier)) as modules:
        for name in writer.names if isinstance(writer, Writer) else sweep.names:
            if name in earlier:
                yield ModuleChange(**earlier[name])
            elif name in sweep.selected:
                yield _edit_one(method, plan, next(modules), writer)
            elif isinstance(writer, Writer) and name not in writer.done:
                writer.copy(name)
            if name == last:
                return


def _edit_one(method: Method, plan: Any, module: Module, writer: Writer | AdapterWriter) -> ModuleChange:
    """Edit, check, measure and write one module."""
    from curvkern.checkpoint import Writer
    from curvkern.ops import Change, change
    from curvkern.report import record_change

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
    elif edit.factors is not None:
        writer.write(module.name, *edit.factors, asdict(done))
    return done


def _wanted(edit: Edit, module: Module, found: Change) -> int:
    """How many weights the method meant to change, before rounding to the checkpoint's dtype."""
    if edit.selected is not None:
        return found.differing if edit.selected == "all" else edit.selected
    return 0 if edit.weight is None else int((edit.weight.float() != module.tuned.float()).sum())
