"""What a method looks at beside weights: its data, the model in memory, statistics of every module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from curvkern.progress import bar
from curvkern.restore.budget import Budget, opened, place, require_resident, shapes_by_layer, size
from curvkern.restore.recipe import CHECKPOINTS, DATA, Recipe
from curvkern.restore.scope import RestoreError
from curvkern.restore.store import Store, asked_of

if TYPE_CHECKING:
    from curvkern.checkpoint import Bundle, Checkpoint, Weights
    from curvkern.curvature import Footprint, Statistics
    from curvkern.evaluate import Example
    from curvkern.methods import Evidence, Method, Need

Score = Callable[[Any, Any], float]
Rows = Mapping[str, "list[Example]"]


def given(recipe: Recipe, argument: str) -> Path:
    """The path that a recipe gives for a role.

    Raises:
        RestoreError: it gives none; names the option.
    """
    value: Path | None = getattr(recipe, argument)
    if value is None:
        option = argument.replace("_", "-")
        raise RestoreError(f"restore: method {recipe.method!r} needs {argument}; pass {argument}=... (--{option}).")
    return value


def looked_at(method: Method) -> frozenset[str]:
    """The roles of checkpoints and data that a method takes: what it always needs, and the data of its statistics."""
    return method.needs | {need.data for need in method.statistics()}


def data_files(recipe: Recipe, method: Method) -> dict[str, Path]:
    """The JSON Lines that the method reads."""
    return {key: given(recipe, key) for key in DATA if key in looked_at(method)}


def read_data(recipe: Recipe, method: Method) -> dict[str, list[Example]]:
    """The JSON Lines that the method reads, before anything heavy.

    Raises:
        RestoreError: a checkpoint or a file that the method needs is not given, or statistics need responses that some
            rows lack (names file and rows).
        FileNotFoundError, ValueError: as `evaluate.read_jsonl`.
    """
    from curvkern.evaluate import read_jsonl

    for argument in CHECKPOINTS:
        if argument in method.needs:
            given(recipe, argument)
    files = data_files(recipe, method)
    data = {key: read_jsonl(path) for key, path in files.items()}
    for key in sorted({need.data for need in method.statistics()}):
        empty = [str(at) for at, row in enumerate(data[key], 1) if row.response is None]
        if empty:
            raise RestoreError(
                f"restore: {files[key]}: {len(empty)} of {len(data[key])} rows have no response, the first are rows "
                f"{', '.join(empty[:8])}; {method.name} measures the loss of responses. Add them."
            )
    return data


def tokenizer_of(bundle: Bundle) -> Any:
    """The tuned model's tokenizer and chat template, where it has them: what is written carries these."""
    from transformers import AutoTokenizer

    aligned = cast("Checkpoint", bundle.sources["aligned"]).directory
    paths = [Path(bundle.sources["tuned"].path), aligned]
    return AutoTokenizer.from_pretrained(next((p for p in paths if (p / "tokenizer_config.json").is_file()), aligned))


#: Bytes of tensors that are read ahead, at most.
_READ_AHEAD = 256 << 20


def read_ahead(room: int | None, working: int) -> int:
    """Bytes of tensors to read ahead: half of the room that a module leaves; reads to come hold the other half.

    Args:
        room: bytes for all of it; None: as many as it takes.
        working: of these, for one module, see `working_set`.
    """
    return _READ_AHEAD if room is None else min(_READ_AHEAD, max(0, room - working) // 2)


def working_set(bundle: Bundle, names: Sequence[str], method: Method, data: Rows) -> int:
    """Bytes that the largest module takes while it is planned or edited.

    These are its tensors in all checkpoints, its statistics, what the method makes of them, and the result as it is
    stored, of this module and of the one before, which is being written.
    """
    from curvkern.curvature import statistics_of_shape

    def of(name: str) -> int:
        spec = bundle.sources["tuned"].spec(name)
        found = [statistics_of_shape(spec.shape, asked_of([n]), len(data[n.data])) for n in method.statistics()]
        return (
            bundle.nbytes(name)
            + sum(found)
            + method.workspace * max(4 * math.prod(spec.shape), *found, 0)
            + 2 * spec.nbytes
        )

    return max(map(of, names))


# statistics -----------------------------------------------------------------------------------------------------------


class ModuleStatistics:
    """What a method's `Method.statistics` ask for, of every module, in memory or in files."""

    def __init__(self, device: str = "cpu", known: Mapping[Need, Statistics] = MappingProxyType({})) -> None:
        """Know nothing yet, or what another found.

        Args:
            device: where a module's statistics are handed out.
            known: as `add` takes them.
        """
        self._device = device
        self._found: dict[Need, Statistics] = dict(known)

    def of(self, name: str, needs: Collection[Need]) -> dict[Need, Tensor]:
        """Those of the statistics that are in ``needs``, of one module: means, where they are sums over data.

        Float32; kept gradients are bfloat16. ``name`` is the checkpoint's.
        """
        from curvkern.curvature.statistics import PER_SAMPLE, PER_TOKEN

        def value(need: Need, found: Statistics) -> Tensor:
            is_sum = need.quantity in (*PER_SAMPLE, *PER_TOKEN)
            tensor = found.mean_of(need.quantity, name) if is_sum else found[need.quantity][name]
            return tensor.to(self._device)

        return {need: value(need, found) for need, found in self._found.items() if need in needs}

    def losses(self, needs: Collection[Need]) -> dict[Need, float]:
        """The mean loss that each of the ``needs`` was measured with."""
        return {need: found.mean_loss for need, found in self._found.items() if need in needs}

    def without(self, at: str) -> ModuleStatistics:
        """Those of other models than ``at``."""
        return ModuleStatistics(self._device, {need: of for need, of in self._found.items() if need.at != at})

    def add(self, found: Mapping[Need, Statistics], names: Sequence[str]) -> None:
        """Take statistics of the modules ``names``.

        Raises:
            RestoreError: a module was not measured.
        """
        for need, of in found.items():
            _require_measured(of[need.quantity], need, names)
        self._found |= found

    def beside(self, found: Mapping[Need, Statistics]) -> ModuleStatistics:
        """These, and others of some modules alone."""
        return ModuleStatistics(self._device, {**self._found, **found})

    @property
    def held(self) -> int:
        """Bytes of them that are in memory, as if no two modules had one Gram."""
        sums = [found.sums[need.quantity] for need, found in self._found.items()]
        return sum(tensor.nbytes for of in sums if isinstance(of, dict) for tensor in of.values())


@dataclass(frozen=True)
class EditAtOnce:
    """What edits modules while the model runs.

    Attributes:
        working: bytes that a module takes, see `working_set`.
        edit: of modules by name, what is known of them, and the bytes that there are for it.
    """

    working: int
    edit: Callable[[Sequence[str], ModuleStatistics, int], object]


def gather_statistics(
    recipe: Recipe,
    needs: Sequence[Need],
    data: Rows,
    bundle: Bundle,
    names: Sequence[str],
    *,
    scratch: Path,
    tuned: Weights | None = None,
    others: ModuleStatistics | None = None,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    edit: EditAtOnce | None = None,
    again: bool = False,
    taken: int = 0,
) -> ModuleStatistics:
    """Estimate what methods ask for, or find it in the recipe's directory of statistics.

    Each model is opened once, in the checkpoint's dtype, and runs once over each set of data for all quantities
    together: in memory if it fits into the budget with what is measured, else layer by layer.

    Args:
        recipe: its ``statistics`` directory, patterns, device and memory budget.
        needs: see `Method.statistics`.
        data: rows by role, from `read_data`.
        bundle: the opened checkpoints.
        names: the modules that are restored.
        scratch: directory for what does not fit into memory; made if it is needed, and needed as long as the result.
        tuned: to measure in place of the bundle's tuned model.
        others: what is known of other models, for the result.
        progress: show a bar.
        tell: takes lines for the report.
        edit: takes the modules of a layer when the last backward that they need ends, if the model runs layer by layer
            and there is room for that; statistics of that backward are not kept.
        again: leave room for as many statistics of the tuned model once more.
        taken: bytes of a budget that is given which are in use.

    Raises:
        RestoreError: a module is not measured by its model, a directory cannot be made or is too small, or not even a
            layer fits into the budget.
        CurvatureError: as `curvature.estimate`.
    """
    from curvkern.curvature import footprint, from_answer

    tokenizer = tokenizer_of(bundle)
    texts = {
        role: [from_answer(tokenizer, row.asked(), row.response or "") for row in data[role]]
        for role in sorted({need.data for need in needs})
    }
    budget = Budget.of(recipe.memory_budget, recipe.device)
    if budget.given:
        budget = budget.less(taken)
    store = Store(recipe, names, scratch, tell)
    gathered = others or ModuleStatistics(recipe.device)
    models: dict[str, dict[tuple[str, str], list[Need]]] = defaultdict(lambda: defaultdict(list))
    for need in needs:
        models[need.at][need.data, need.loss].append(need)
    *_, last = (wanted for sets in models.values() for wanted in sets.values())
    sources: dict[str, Weights] = {at: bundle.sources[at] for at in models} | ({"tuned": tuned} if tuned else {})
    footprints: dict[str, Footprint] = {}
    for at, sets in models.items():
        asked = [(texts[role], asked_of(wanted)) for (role, _), wanted in sets.items()]
        itemsize = sources[at].spec(names[0]).dtype.itemsize
        footprints[at] = footprint(shapes_by_layer(sources[at]), itemsize, asked, frozenset(names))
    once_more = sum(needed.statistics for needed in footprints.values()) if again else 0
    for at, sets in models.items():
        source, needed = sources[at], footprints[at]
        if at == "tuned":
            needed = replace(needed, statistics=needed.statistics + once_more)
        roles = " and ".join(sorted({role for role, _ in sets}))
        where = place(budget, needed, f"statistics of {roles} data at {at}")
        edited: str | None = None  # data
        with opened(source, recipe.device, resident=where.resident) as model:
            for (role, _), wanted in sets.items():
                found = store.there(wanted, model, texts[role])
                gathered.add(found, names)
                left = [need for need in wanted if need not in found]
                if not left:
                    continue
                what = f"{role} data at {at}"
                with bar(what, len(texts[role]), progress) as advance:
                    estimated = partial(
                        store.estimated, left, model, texts[role], where, needed, _counting(advance, what)
                    )
                    if edit is not None and wanted is last and edit.working <= where.room:
                        _edit_as_complete(estimated, left, names, gathered, edit, where.room)
                        edited = role
                    else:
                        gathered.add(estimated(), names)
        if not where.resident:
            told = where.told(edited, kept=edited is None or len(sets) > 1)
            tell(f"statistics of {roles} data at {at}: {told}; model {size(needed.model)}, {budget}")
        if not where.statistics_in_files:
            budget = budget.less(footprints[at].statistics)
    return gathered


def _edit_as_complete(
    estimated: Callable[..., object],
    needs: Sequence[Need],
    names: Sequence[str],
    known: ModuleStatistics,
    edit: EditAtOnce,
    room: int,
) -> None:
    """Estimate the statistics ``needs``, and edit the modules of each layer when its backward ends."""
    done: set[str] = set()

    def complete(found: Statistics) -> None:
        measured = [name for name in names if all(name in found.sums.get(need.quantity, ()) for need in needs)]
        edit.edit(measured, known.beside(dict.fromkeys(needs, found)), room)
        done.update(measured)

    estimated(complete=complete)
    _require_measured(done, needs[0], names)


def _counting(advance: Callable[[int, str], None], what: str) -> Callable[[int, int], None]:
    return lambda done, total: advance(done, what)


@contextmanager
def scratch_beside(out: Path) -> Generator[Path]:
    """A directory that may be made beside an output, and is gone in the end; a killed run leaves it for the next."""
    out = out.expanduser()
    directory = out.with_name(f"{out.name}.partial-statistics")
    try:
        yield directory
    finally:
        rmtree(directory, ignore_errors=True)


def _require_measured(measured: Container[str], need: Need, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in measured]:
        raise RestoreError(
            f"restore: {missing[0]} and {len(missing) - 1} more have no {need.quantity}: the {need.at} model does not "
            "run them, or transformers holds them in another form. Leave them out with exclude=..."
        )


# the model in memory --------------------------------------------------------------------------------------------------


def hidden_evidence(recipe: Recipe, method: Method, data: Rows, bundle: Bundle, score: Score | None) -> Evidence:
    """The model in memory, with the harmful and task prompts as tokens.

    Raises:
        RestoreError: aligned and tuned tie their heads differently, the task score is exact match and rows of the task
            have no response, or the model does not fit into the memory budget.
        CurvatureError: as `curvature.HiddenEvidence`.
    """
    from curvkern.curvature import HiddenEvidence
    from curvkern.evaluate import chat_prompt

    if heads := [name for name, why in bundle.skipped.items() if "embedding" in why]:
        raise RestoreError(
            f"restore: {heads[0]} is tied to the embedding in one of aligned and tuned and not in the other; "
            f"{method.name} runs both in one model. Save them alike."
        )
    options = method.evidence_options()
    require_resident(Budget.of(recipe.memory_budget, recipe.device), _whole_model(bundle, options), method.name)
    tokenizer = tokenizer_of(bundle)
    prompts = {key: [chat_prompt(tokenizer, row.asked()) for row in rows] for key, rows in data.items()}
    judge = score or _exact_match(data["task"], recipe)
    tuned = bundle.sources["tuned"]
    return HiddenEvidence(
        cast("Checkpoint", bundle.sources["aligned"]).directory,
        ((name, tuned.read(name)) for name in bundle.names),
        prompts=prompts,  # pyright: ignore[reportArgumentType]
        score=lambda model: judge(model, tokenizer),
        device=recipe.device,
        **options,
    )


def _whole_model(bundle: Bundle, options: Mapping[str, Any]) -> int:
    """Bytes of a working copy, its gradient and their float32 sums, beside aligned and tuned."""
    weights = sum(math.prod(bundle.sources["tuned"].spec(name).shape) for name in bundle.names)
    stored = sum(bundle.sources[role].spec(name).nbytes for role in ("aligned", "tuned") for name in bundle.names)
    working = 4 * weights if options.get("dtype") == torch.float32 else stored // 2
    return 2 * working + 4 * weights + stored


def _exact_match(rows: Sequence[Example], recipe: Recipe) -> Score:
    """The share of task prompts that a model answers, greedily, with exactly the expected response."""
    from curvkern.evaluate import generate, task_accuracy

    expected = [row.response for row in rows if row.response is not None]
    if len(expected) < len(rows):
        raise RestoreError(
            f"restore: {recipe.task}: {len(rows) - len(expected)} rows have no response; the task score is exact match "
            "of responses. Add them, or pass score=... from Python."
        )

    def score(model: Any, tokenizer: Any) -> float:
        longest = max(len(tokenizer.encode(text)) for text in expected)
        answers = generate(model, tokenizer, [row.asked() for row in rows], max_new_tokens=longest + 4)
        return task_accuracy(answers, expected).value

    return score
