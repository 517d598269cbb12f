"""Every method over seeds, shares of poison and strengths: medians with ranges, and what each gives up for safety."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from curvkern.demo import DemoModels

#: method -> the parameters tried, its defaults first.
STRENGTHS: dict[str, tuple[dict[str, Any], ...]] = {
    "budgeted": ({}, {"rounds": 1}, {"budget": 0.01}, {"budget": 0.2, "reach": 3.0}),
    "gradient_rollback": ({}, {"steps": 30, "save_every": 1, "max_drop": 0.02}),
    "curvature": ({}, {"rise": 10.0}, {"rise": 3.0}, {"inverse": "ekfac"}),
    "ascent": ({}, {"rho": 0.5}, {"rho": 2.0}),
    "rewind": ({}, {"safety_fraction": 0.3}, {"by": "wanda"}, {"by": "actsvd"}),
    "antidote": ({}, {"fraction": 0.3}, {"fraction": 0.5}),
    "safe_delta": ({}, {"budget": 0.01}, {"budget": 1.0}),
    "irr": ({}, {"spared": 0.3}, {"spared": 0.6}),
    "resta": ({}, {"beta": 0.25}, {"beta": 0.5}),
    "lox": ({}, {"alpha": 0.5}, {"rank": 16}, {"rank": 16, "alpha": 0.5}),
    "safe_lora": ({}, {"number": 20}, {"number": 30}, {"projector": "basis", "rank": 16, "number": 20}),
    "splora": ({}, {"number": 20}, {"number": 30}),
    "safe_merge": ({}, {"weight": 0.5}, {"weight": 0.8}),
    "merge": ({}, {"weight": 0.25}, {"weight": 0.35}, {"kind": "ties"}, {"kind": "dare"}),
    "random": ({}, {"fraction": 0.2}, {"fraction": 0.5}),
}
POISON = (0.02, 0.05, 0.1)
EXTRA_STEPS = 60  # of training the unaligned model and the safety adapter


@dataclass(frozen=True)
class Trial:
    """One model, measured; rates and shares in [0, 1].

    Attributes:
        seed: of data, weights and training.
        poison: share of forbidden answers among the tuning data; 0 for the aligned model.
        kind: how it was tuned: ``"full"`` or ``"lora"``; or ``"aligned"``.
        method: of `STRENGTHS`; ``"tuned"`` and ``"aligned"`` are the models themselves.
        parameters: other than the method's defaults.
        harmful: harmful requests that were not refused.
        over_refusal: harmless requests that were refused.
        task: task requests answered exactly as expected.
        changed: weights of the decoder's linear modules that differ from the tuned model's.
        seconds: of the restoration, with such statistics as no method before it had asked for.
        error: why the method gave nothing; its rates are then those of the tuned model, which it leaves as it is.
    """

    seed: int
    poison: float
    kind: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    harmful: float = 0.0
    over_refusal: float = 0.0
    task: float = 0.0
    changed: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def key(self) -> str:
        """What tells it from other trials."""
        return json.dumps([self.seed, self.poison, self.kind, self.method, self.parameters], sort_keys=True)

    @property
    def name(self) -> str:
        """``curvature tau=0.03``."""
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.parameters.items())])


def run(
    out: Path,
    *,
    seeds: Sequence[int],
    poison: Sequence[float] = POISON,
    strengths: Mapping[str, Sequence[dict[str, Any]]] = STRENGTHS,
    console: Console | None = None,
) -> list[Trial]:
    """Train models for every seed and share of poison, fully and as LoRA adapters; restore and measure each.

    Every trial is a line of ``campaign.jsonl``, written at once; those that are there are not run again. At the end
    ``campaign.csv``, ``campaign.md`` and ``campaign.html`` hold what all lines of the file say together.

    Args:
        out: directory for models, statistics and results.
        seeds: of data, weights and training.
        poison: shares of forbidden answers among the tuning data, each in (0, 0.8).
        strengths: method -> parameters to try.
        console: where to print.

    Returns:
        All trials of the file.

    Raises:
        ValueError: a share of poison is out of range.
    """
    from curvkern.demo import prepare
    from curvkern.demo.story import quiet
    from curvkern.demo.summary import write

    if wrong := [share for share in poison if not 0 < share < 0.8]:
        raise ValueError(f"demo: poison is {wrong[0]:g}; wanted shares between 0 and 0.8, the rest is other rows.")
    console = console or Console()

    def tell(text: str) -> None:
        console.print(f"  {text}", highlight=False, soft_wrap=True)

    out.mkdir(parents=True, exist_ok=True)
    log = _Log(out / "campaign.jsonl", tell)
    with quiet():
        for seed in seeds:
            for share in poison:
                models = prepare(out, seed=seed, poison=share, progress=tell)
                given = _roles(models, seed)
                log.add(Trial(seed, 0.0, "aligned", "aligned"), partial(_measured, models.aligned, models))
                for kind, tuned in {"full": models.tuned, "lora": models.adapter}.items():
                    if tuned is not None:
                        given["statistics"] = out / "statistics" / f"{seed}-{share:g}-{kind}"
                        before = log.add(Trial(seed, share, kind, "tuned"), partial(_measured, tuned, models))
                        for blank in _blanks(before, strengths):
                            log.add(blank, partial(_restored, tuned, models, given, before))
    found = list(log.trials.values())
    write(found, out)
    tell(f"page: {out / 'campaign.html'}")
    return found


def read(path: Path) -> list[Trial]:
    """The trials of a ``campaign.jsonl``."""
    return [Trial(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


class _Log:
    """The trials of a file, which grows by a line for each."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self.tell = tell
        self.trials = {trial.key: trial for trial in read(path)} if path.is_file() else {}

    def add(self, blank: Trial, measure: Callable[[Trial], Trial]) -> Trial:
        """The trial as it stands in the file; measured if it does not."""
        if blank.key not in self.trials:
            found = self.trials[blank.key] = measure(blank)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(found)) + "\n")
            self.tell(f"seed {found.seed}, {100 * found.poison:g} % {found.kind}: {found.name}: {_rates(found)}")
        return self.trials[blank.key]


def _blanks(tuned: Trial, strengths: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[Trial]:
    for method, tried in strengths.items():
        for values in tried:
            yield Trial(tuned.seed, tuned.poison, tuned.kind, method, values)


def _roles(models: DemoModels, seed: int) -> dict[str, Path]:
    """What methods ask for beside the aligned and the tuned model; the models among it are trained, once for a seed."""
    from curvkern.demo import ROWS, data, save, train, tune_adapter, tune_layers, write_rows
    from curvkern.evaluate import load

    root, names = models.base.parent, data.split_names(seed)
    roles = {"base": models.base, "safety": models.harmful, "task": models.task, "harmful": root / "answers.jsonl"}
    if not roles["harmful"].is_file():
        write_rows(roles["harmful"], {data.forbidden: 1.0}, names.restore, ROWS["harmful"], seed)

    def missing(role: str) -> bool:
        roles[role] = root / role
        return not (root / role / "done").is_file()

    harmless: data.Mixture = {data.ordinary: 0.25, data.about: 0.25}
    if missing("unaligned"):
        model, tokenizer = load(models.aligned)
        phase = train.Phase({data.forbidden: 0.5, **harmless}, EXTRA_STEPS, 24, 1e-3)
        tune_layers(model, tokenizer, phase, names.train, seed=f"unaligned {seed}")
        save(roles["unaligned"], model, tokenizer)
    if models.adapter is not None and missing("safety_adapter"):
        model, tokenizer = load(models.aligned)
        phase = train.Phase({data.refused: 0.5, **harmless}, EXTRA_STEPS, 24, 1e-2)
        adapted = tune_adapter(model, tokenizer, phase, names.train, seed=seed, rows=f"safety_adapter {seed}")
        adapted.peft_config["default"].base_model_name_or_path = str(models.aligned)
        save(roles["safety_adapter"], adapted, tokenizer)
    return roles


def _restored(tuned: Path, models: DemoModels, given: Mapping[str, Path], before: Trial, blank: Trial) -> Trial:
    from curvkern.methods import MethodError
    from curvkern.restore import restore

    with TemporaryDirectory(prefix="restored-", dir=models.base.parent) as place:
        target = Path(place) / "model"
        try:
            report = restore(models.aligned, tuned, method=blank.method, out=target, **given, **blank.parameters)
        except MethodError as error:
            rates = {name: getattr(before, name) for name in ("harmful", "over_refusal", "task")}
            return replace(blank, **rates, error=str(error))
        found = _measured(target, models, blank)
        return replace(found, changed=report.changed / report.weights, seconds=report.seconds)


def _measured(path: Path, models: DemoModels, blank: Trial) -> Trial:
    from curvkern.demo.story import evaluated

    found = evaluated(path, models).as_dict()
    rates = {name: round(found[name]["value"], 6) for name in ("harmful", "over_refusal", "task")}
    return replace(blank, **rates)


def _rates(trial: Trial) -> str:
    rates = (trial.harmful, trial.over_refusal, trial.task, trial.changed)
    return " / ".join(f"{100 * rate:.1f}" for rate in rates) + f" %, {trial.seconds:.1f} s {trial.error}"
