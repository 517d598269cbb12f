"""What a method looks at beside weights: its data, the model in memory, statistics of every module."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from curvkern.progress import bar
from curvkern.recipe import CHECKPOINTS, DATA, Recipe
from curvkern.scope import RestoreError

if TYPE_CHECKING:
    from curvkern.checkpoint import Bundle, Checkpoint
    from curvkern.curvature import Choices, Statistics, Text
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


# statistics -----------------------------------------------------------------------------------------------------------

#: What is asked of `curvature.estimate` to get a quantity that it does not take by itself.
_COMES_WITH = {"input_gram": "kfac", "output_gram": "kfac", "input_basis": "ekfac", "output_basis": "ekfac"}


class ModuleStatistics:
    """What a method's `Method.statistics` ask for, of every module; in memory, float32 (kept gradients: bfloat16)."""

    def __init__(self) -> None:
        self._found: dict[Need, dict[str, Tensor]] = {}

    def of(self, name: str, needs: Collection[Need]) -> dict[Need, Tensor]:
        """Those of the statistics that are in ``needs``, of one module, by its checkpoint name."""
        return {need: tensors[name] for need, tensors in self._found.items() if need in needs}

    def add(self, need: Need, found: Statistics, names: Sequence[str]) -> None:
        """Take a statistic of the modules ``names``: its mean, where it is a sum over data.

        Raises:
            RestoreError: a module was not measured.
        """
        from curvkern.curvature.statistics import PER_SAMPLE, PER_TOKEN

        _require_measured(found, need, names)
        wanted = replace(found, sums={need.quantity: {name: found[need.quantity][name] for name in names}})
        is_sum = need.quantity in (*PER_SAMPLE, *PER_TOKEN)
        self._found[need] = wanted.mean(need.quantity) if is_sum else wanted[need.quantity]


def gather_statistics(
    recipe: Recipe,
    needs: Sequence[Need],
    data: Rows,
    bundle: Bundle,
    names: Sequence[str],
    *,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> ModuleStatistics:
    """Estimate what methods ask for, or load it from the recipe's directory of statistics.

    Each model is in memory once, in the checkpoint's dtype, and runs once over each set of data for all quantities
    together.

    Args:
        recipe: its ``statistics`` directory, patterns and device.
        needs: see `Method.statistics`.
        data: rows by role, from `read_data`.
        bundle: the opened checkpoints.
        names: the modules that are restored.
        progress: show a bar.
        tell: takes lines for the report.

    Raises:
        RestoreError: a module is not measured by its model, or the directory cannot be made.
        CurvatureError: as `curvature.estimate`.
    """
    from curvkern.curvature import from_answer

    tokenizer = tokenizer_of(bundle)
    texts = {
        role: [from_answer(tokenizer, row.asked(), row.response or "") for row in data[role]]
        for role in sorted({need.data for need in needs})
    }
    store = _Store(recipe.statistics, tell)
    gathered = ModuleStatistics()
    models: dict[str, dict[tuple[str, str], list[Need]]] = defaultdict(lambda: defaultdict(list))
    for need in needs:
        models[need.at][need.data, need.loss].append(need)
    for at, sets in models.items():
        model = _loaded(bundle, at, recipe.device)
        for (role, _), asked in sets.items():
            what = f"{role} data at {at}"
            with bar(what, len(texts[role]), progress) as advance:
                found = store.find(asked, model, texts[role], recipe, names, _counting(advance, what))
            for need in asked:
                gathered.add(need, found[need], names)
    return gathered


def _counting(advance: Callable[[int, str], None], what: str) -> Callable[[int, int], None]:
    return lambda done, total: advance(done, what)


class _Store:
    """A directory of statistics that several runs share; a file's name tells model, data and loss."""

    def __init__(self, directory: Path | None, tell: Callable[[str], None]) -> None:
        self._directory = None if directory is None else directory.expanduser()
        self._tell = tell
        if self._directory is not None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RestoreError(f"restore: statistics={self._directory}: {error.strerror}.") from None

    def find(
        self,
        needs: Sequence[Need],
        model: Any,
        texts: Sequence[Text],
        recipe: Recipe,
        names: Sequence[str],
        advance: Callable[[int, int], None],
    ) -> dict[Need, Statistics]:
        """Statistics of one model on one set of data under one loss: those that are there, the rest estimated."""
        from curvkern.curvature import Choices, estimate
        from curvkern.curvature.statistics import fingerprint
        from curvkern.curvature.texts import fingerprint as data_fingerprint

        dtype = str(model.dtype).removeprefix("torch.")
        choices = Choices(model=fingerprint(model.named_parameters()), loss=needs[0].loss, dtype=dtype)
        data = data_fingerprint(texts)
        found = {need: held for need in needs if (held := self._load(need, choices, data, names)) is not None}
        if left := [need for need in needs if need not in found]:
            estimated = estimate(
                model, texts, quantity=_asked(left), loss=needs[0].loss, tell=advance,
                include=recipe.include, exclude=recipe.exclude,
            )  # fmt: skip
            for need in left:
                found[need] = self._keep(need, estimated, choices, data)
        return found

    def _load(self, need: Need, choices: Choices, data: str, names: Sequence[str]) -> Statistics | None:
        from curvkern.curvature import Statistics

        path = self._path(need, choices, data)
        if path is None or not path.is_file():
            return None
        held = Statistics.load(path)
        fits = held.choices == choices and held.counts.data == (data,)
        if not fits or not set(names) <= set(held.sums.get(need.quantity, {})):
            return None
        self._tell(f"{need.quantity} of {need.data} data at {need.at}: from {path}")
        return held

    def _keep(self, need: Need, estimated: Statistics, choices: Choices, data: str) -> Statistics:
        one = replace(estimated, sums={need.quantity: estimated[need.quantity]})
        if (path := self._path(need, choices, data)) is not None:
            one.save(path)
        return one

    def _path(self, need: Need, choices: Choices, data: str) -> Path | None:
        if self._directory is None:
            return None
        key = zlib.crc32(repr(sorted(asdict(choices).items())).encode())
        return self._directory / f"{need.data}-at-{need.at}-{need.quantity}-{data}-{key:08x}.safetensors"


def _asked(needs: Iterable[Need]) -> list[str]:
    """What `curvature.estimate` is asked for."""
    from curvkern.curvature.sums import QUANTITIES

    known = frozenset[str](QUANTITIES)
    return sorted({q if q in known else _COMES_WITH.get(q, q) for q in (need.quantity for need in needs)})


def _require_measured(found: Statistics, need: Need, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in found[need.quantity]]:
        raise RestoreError(
            f"restore: {missing[0]} and {len(missing) - 1} more have no {need.quantity}: the {need.at} model does not "
            "run them, or transformers holds them in another form. Leave them out with exclude=..."
        )


def _loaded(bundle: Bundle, at: str, device: str) -> Any:
    """The aligned or the tuned model in its checkpoint's dtype; an adapter's weights are put into the aligned model."""
    from transformers import AutoModelForCausalLM

    from curvkern.checkpoint import TunedView

    source = bundle.sources[at]
    under = source.aligned if isinstance(source, TunedView) else source
    under.require_config()
    model: Any = AutoModelForCausalLM.from_pretrained(under.directory, dtype="auto")
    model.to(device).eval()
    if isinstance(source, TunedView):
        changed = (*source.adapter.names, *source.adapter.replaced)
        _put(model, ((name, source.read(name)) for name in changed))
    return model


@torch.no_grad()
def _put(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    state = model.state_dict()
    for name, tensor in tensors:
        if name not in state:
            raise RestoreError(
                f"restore: the checkpoint's {name} is no parameter of {type(model).__name__}: this transformers holds "
                "it in another form, so that an adapter on it cannot be run. Merge it into a checkpoint."
            )
        state[name].copy_(tensor)


# the model in memory --------------------------------------------------------------------------------------------------


def hidden_evidence(recipe: Recipe, method: Method, data: Rows, bundle: Bundle, score: Score | None) -> Evidence:
    """The model in memory, with the harmful and task prompts as tokens.

    Raises:
        RestoreError: aligned and tuned tie their heads differently, or the task score is exact match and rows of the
            task have no response.
        CurvatureError: as `curvature.HiddenEvidence`.
    """
    from curvkern.curvature import HiddenEvidence
    from curvkern.evaluate import chat_prompt

    if heads := [name for name, why in bundle.skipped.items() if "embedding" in why]:
        raise RestoreError(
            f"restore: {heads[0]} is tied to the embedding in one of aligned and tuned and not in the other; "
            f"{method.name} runs both in one model. Save them alike."
        )
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
        **method.evidence_options(),
    )


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
