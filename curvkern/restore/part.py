"""`Part`: one method's share in a pass: what it looks at, what it restores, and where that goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvkern.restore.evidence import Score, data_files, looked_at, read_data, working_set
from curvkern.restore.recipe import CHECKPOINTS, DATA, Recipe
from curvkern.restore.scope import RestoreError, layer_of, select_modules

if TYPE_CHECKING:
    from curvkern.checkpoint import Adapter, AdapterWriter, Bundle, Checkpoint, DeltaWriter, TunedView, Writer
    from curvkern.methods import Method
    from curvkern.report import ModuleChange, Report

    Source = Checkpoint | TunedView
    AnyWriter = Writer | AdapterWriter | DeltaWriter


class Part:
    """One method in a pass that several methods may share.

    Attributes:
        recipe: of this method alone.
        method: with its parameters.
        needs: the statistics that it asks for.
        data: the rows that it reads, by role.
        stages: what it went through.
        messages: lines for its report.
        plan: of the method, once it is made.
        names: the modules to restore, in file order; from `open` on, like all below.
        writer: of its output.
        saved: ``"checkpoint"``, ``"adapter"`` or ``"delta"``.
        working: bytes that one of its modules takes, see `evidence.working_set`.
        bits: bytes of the device that say which weights are rolled back, where the method measures again: those of the
            model that is measured, and the next ones.
        changes: what happened to a module, by name, in an earlier run too; grows.
    """

    def __init__(self, recipe: Recipe, method: Method) -> None:
        """Read the method's data, before anything heavy.

        Raises:
            RestoreError, FileNotFoundError, ValueError: as `evidence.read_data`.
        """
        from curvkern.report import Stages

        self.recipe = recipe
        self.method = method
        self.needs = method.statistics()
        self.data = read_data(recipe, method)
        self.stages = Stages()
        self.messages = [f"{method.name} does not look at {name}" for name in _unused(recipe, method)]
        self.plan: Any = None

    def open(self, bundle: Bundle, *, overwrite: bool, resume: bool, score: Score | None) -> AnyWriter:
        """Select the modules and begin the output, which is to be closed.

        Args:
            bundle: the opened checkpoints; other methods' may be among them.
            overwrite: replace what is at the recipe's ``out``.
            resume: go on where a killed run stopped.
            score: what the task score is taken from; part of what a resumed run must agree with.

        Raises:
            RestoreError: the recipe does not fit the checkpoints.
            CheckpointError: an input is not the one that the recipe expects, or as `checkpoint.Writer`.
        """
        from curvkern.checkpoint import Writer, require_recorded
        from curvkern.report import ModuleChange

        tuned = bundle.sources["tuned"]
        shapes = {name: tuned.spec(name).shape for name in bundle.names}
        self.names = select_modules(shapes, self.method, self.recipe, tuned.config)
        self.messages += _told_of(shapes, self.names, bundle)
        own = {"aligned", "tuned", *self.method.needs}
        sources = {role: source for role, source in bundle.sources.items() if role in own}
        files = data_files(self.recipe, self.method)
        require_recorded(self.recipe.expected, {**sources, **files})
        self.saved = _saved(self.recipe, self.method, tuned.adapter, self.names)
        options: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "inputs": sources}
        options |= {"recipe": _resolved(self.recipe, self.method, score), "data": files}
        self.writer = _writer(self.saved, self.recipe.out, tuned, self.names, options)
        earlier = self.writer.notes
        weights = sum(math.prod(shapes[name]) for name in self.names)
        on_device = self.method.measures_again and bundle.device.type == "cpu"
        self.bits = 2 * weights // 8 if on_device else 0
        self.working = working_set(bundle, self.names, self.method, self.data)
        self.changes: dict[str, ModuleChange] = {name: ModuleChange(**note) for name, note in earlier.items()}
        self._selected = frozenset(self.names)
        self._between: Iterator[str] = iter(self.writer.names if isinstance(self.writer, Writer) else ())
        return self.writer

    @property
    def left(self) -> frozenset[str]:
        """The modules that are not restored yet."""
        return frozenset(self.names) - self.changes.keys()

    def copy_before(self, name: str) -> None:
        """Copy the tensors that are not restored and lie before a module that is about to be written.

        Of modules in another order than that of the file, the second brings all that is not copied yet.
        """
        from curvkern.checkpoint import Writer

        for other in self._between:
            if other == name:
                return
            if isinstance(self.writer, Writer) and other not in self._selected and other not in self.writer.done:
                self.writer.copy(other)

    def finish(self) -> Report:
        """Write the report and give the output its name."""
        from curvkern.checkpoint import as_json, plain
        from curvkern.report import Report, render_page

        report = Report(
            method=self.method.name,
            source=self.method.source,
            recipe=self.recipe.record(),
            out=str(self.recipe.out.expanduser()),
            saved=self.saved,
            modules=[self.changes[name] for name in self.names],
            stages=self.stages.done,
            messages=self.messages,
        )
        told = plain(report.as_dict())
        pages = {"report.json": as_json(told), "report.html": render_page(report)}
        self.writer.finish({"restoration": told, "device": self.recipe.device}, extra_files=pages)
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


def _unused(recipe: Recipe, method: Method) -> list[str]:
    return [name for name in (*CHECKPOINTS, *DATA) if getattr(recipe, name) and name not in looked_at(method)]


def _saved(recipe: Recipe, method: Method, adapter: Adapter | None, names: Sequence[str]) -> str:
    """What is written: "checkpoint", "adapter" or "delta"."""
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
    if adapter is not None and recipe.save == "delta":
        raise RestoreError(
            "restore: cannot save a delta: the tuned model is an adapter, and a delta is against a whole checkpoint; "
            "use save='checkpoint' or 'auto'."
        )
    if recipe.save == "auto":
        return "checkpoint" if why is not None else "adapter"
    return recipe.save


def _writer(saved: str, out: Path, tuned: Source, names: Sequence[str], options: dict[str, Any]) -> AnyWriter:
    from curvkern.checkpoint import AdapterWriter, Checkpoint, DeltaWriter, Writer

    if saved == "adapter" and tuned.adapter is not None:
        return AdapterWriter(out, tuned.adapter, **options)
    tuned.require_config()
    if saved == "delta" and isinstance(tuned, Checkpoint):
        return DeltaWriter(out, tuned, names, **options)
    return Writer(out, tuned, **options)
