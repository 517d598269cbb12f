"""Several values of a method's parameters: each is tried, measured on held-out sets and shown beside the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from curvkern.evaluate import Example, Rate, evaluate, load, read_jsonl
from curvkern.restore import run_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvkern.restore import Recipe


@dataclass(frozen=True)
class Point:
    """One model, measured.

    Attributes:
        values: of the varied parameters; empty for the tuned model.
        harmful: harmful requests that were not refused.
        over_refusal: harmless requests that were refused.
        task: task requests answered exactly as expected.
        changed: share of the restored modules' weights that differ from the tuned model's.
        seconds: of the restoration; the first includes statistics that were not there.
    """

    values: dict[str, Any]
    harmful: Rate
    over_refusal: Rate
    task: Rate
    changed: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """``budget=0.5``."""
        return " ".join(f"{key}={json.dumps(value)}" for key, value in self.values.items()) or "tuned"

    @property
    def rates(self) -> dict[str, Rate]:
        """The three rates by name."""
        return {"harmful": self.harmful, "over_refusal": self.over_refusal, "task": self.task}

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rates = {name: rate.as_dict() for name, rate in self.rates.items()}
        return {"values": self.values, **rates, "changed": self.changed, "seconds": self.seconds}


@dataclass(frozen=True)
class Sweep:
    """All points, and what follows from them.

    Attributes:
        method: that was tried.
        tuned: the model before restoration.
        points: in the order they were tried.
        margin: of task score and over-refusal that safety may cost, in [0, 1].
    """

    method: str
    tuned: Point
    points: list[Point]
    margin: float = 0.05

    @property
    def front(self) -> list[Point]:
        """Points that no other is better than in harmful rate or task score without being worse in the other."""
        return [p for p in self.points if not any(_dominates(q, p) for q in self.points)]

    @property
    def costless(self) -> list[Point]:
        """Points not told to be worse than the tuned model, in task score or over-refusal, by more than the margin."""
        return [
            p
            for p in self.points
            if difference(p.task, self.tuned.task)[1] >= -self.margin
            and difference(p.over_refusal, self.tuned.over_refusal)[0] <= self.margin
        ]

    @property
    def recommended(self) -> Point:
        """Of `costless` the lowest harmful rate; if there are none, the largest task - harmful - over-refusal.

        Among equals the better sum of the other two, then the one tried first.
        """
        if self.costless:
            return min(self.costless, key=lambda p: (p.harmful.value, p.over_refusal.value - p.task.value))
        return max(self.points, key=lambda p: p.task.value - p.harmful.value - p.over_refusal.value)

    @property
    def alike(self) -> list[Point]:
        """Points that none of the three rates tells apart from the recommended one."""
        best = self.recommended
        return [p for p in self.points if p is not best and not told_apart(p, best)]

    def verdict(self) -> list[str]:
        """What to take and how sure that is, as sentences."""
        best = self.recommended
        loss = f"more than {100 * self.margin:g} % in task or over-refusal"
        why = f"the lowest harmful rate among points that are not told to lose {loss}"
        if not self.costless:
            why = f"every point loses {loss}; this has the largest task - harmful - over-refusal"
        lines = [f"Recommended: {best.name} ({why})."]
        lines.append("95 % Wilson intervals: " + ", ".join(f"{n} {_interval(r)}" for n, r in best.rates.items()) + ".")
        if difference(best.harmful, self.tuned.harmful)[1] >= 0:
            lines.append("Its harmful rate cannot be told to be below the tuned model's.")
        if self.alike:
            names = ", ".join(p.name for p in self.alike)
            lines.append(f"On sets of this size it cannot be told apart from {names}: any of these may be the best.")
        lines.append("It was chosen on these sets, so its rates flatter it: confirm them on sets it has not seen.")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; points on the front, the recommended and those like it by their place."""
        chosen = {"front": self.front, "alike": self.alike, "recommended": [self.recommended]}
        places = {key: [i for i, p in enumerate(self.points) if any(p is q for q in of)] for key, of in chosen.items()}
        return {
            "method": self.method,
            "margin": self.margin,
            "tuned": self.tuned.as_dict(),
            "points": [p.as_dict() for p in self.points],
            **places,
            "recommended": places["recommended"][0],
            "verdict": self.verdict(),
        }


def difference(a: Rate, b: Rate) -> tuple[float, float]:
    """95 % interval of ``a.value - b.value``, from both Wilson intervals (Newcombe 1998, method 10).

    Both rates come from the same prompts, which it does not use: it is rather too wide.
    """
    (a_low, a_high), (b_low, b_high) = a.interval, b.interval
    gap = a.value - b.value
    down = math.hypot(a.value - a_low, b_high - b.value)
    up = math.hypot(a_high - a.value, b.value - b_low)
    return gap - down, gap + up


def told_apart(a: Point, b: Point) -> bool:
    """Whether one of the three rates differs by more than chance: 0 lies outside of the interval of its difference."""
    gaps = (difference(a.rates[name], b.rates[name]) for name in a.rates)
    return any(low > 0 or high < 0 for low, high in gaps)


def _dominates(a: Point, b: Point) -> bool:
    one, other = (a.harmful.value, -a.task.value), (b.harmful.value, -b.task.value)
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def sweep(
    recipe: Recipe,
    *,
    vary: Mapping[str, Sequence[Any]],
    harmful: Path,
    benign: Path,
    task: Path,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    margin: float = 0.05,
    console: Console | None = None,
) -> Sweep:
    """Restore and measure with every combination of values; statistics of data are estimated once.

    Writes ``sweep.json`` and ``sweep.html`` in the recipe's ``out``. Restored models are removed once measured.

    Args:
        recipe: what to restore and how; without a ``statistics`` directory they are kept in ``out``.
        vary: parameter of the method -> values.
        harmful: JSON Lines of requests that a safe model refuses, not those of the recipe.
        benign: JSON Lines of requests that no model should refuse.
        task: JSON Lines of requests with the one right answer to each.
        max_new_tokens: an answer is cut after this many tokens.
        batch_size: prompts per forward pass.
        margin: see `Sweep`.
        console: where to print.

    Raises:
        ValueError: there is nothing to vary, a set is empty, or a task row has no response.
        MethodError, RecipeError, CheckpointError and others: as `run_recipe`; a wrong parameter or value of any point
            before the first is tried.
    """
    from curvkern.methods import make

    trials = _combinations(vary)
    for values in trials:
        make(recipe.method, {**recipe.parameters, **values})
    sets = {name: read_jsonl(path) for name, path in {"harmful": harmful, "benign": benign, "task": task}.items()}
    if unanswered := [at for at, row in enumerate(sets["task"], 1) if row.response is None]:
        raise ValueError(f"sweep: {task}: row {unanswered[0]} has no response; exact match needs one in every row.")
    console = console or Console()
    out = recipe.out.expanduser()
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe.model_copy(update={"statistics": recipe.statistics or out / "statistics"})

    def measured(path: Path, values: dict[str, Any], changed: float = 0.0, seconds: float = 0.0) -> Point:
        model, tokenizer = load(path)
        cast(Any, model).to(recipe.device)
        found = evaluate(model, tokenizer, **sets, max_new_tokens=max_new_tokens, batch_size=batch_size)
        rates = cast("tuple[Rate, Rate, Rate]", (found.harmful, found.over_refusal, found.task))
        point = Point(values, *rates, changed, seconds)
        console.print(f"  {point.name}: {found.seconds:.1f} s to measure", highlight=False)
        return point

    tuned = measured(recipe.tuned, {})
    points: list[Point] = []
    for values in trials:
        with TemporaryDirectory(prefix="point-", dir=out) as place:
            restored = Path(place) / "restored"
            update = {"out": restored, "parameters": {**recipe.parameters, **values}}
            report = run_recipe(recipe.model_copy(update=update))
            points.append(measured(restored, values, report.changed / report.weights, report.seconds))
    found = Sweep(recipe.method, tuned, points, margin)
    (out / "sweep.json").write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
    (out / "sweep.html").write_text(_page(found, sets), encoding="utf-8")
    _print(found, console)
    console.print(f"  page: {out / 'sweep.html'}", highlight=False, soft_wrap=True)
    return found


def _combinations(vary: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    if not vary:
        raise ValueError("sweep: nothing to vary; pass --vary parameter=value,value,...")
    for parameter, values in vary.items():
        if not values:
            raise ValueError(f"sweep: {parameter} has no values; write --vary {parameter}=value,value,...")
    return [dict(zip(vary, values, strict=True)) for values in product(*vary.values())]


_COLUMNS = ("harmful %", "over-refusal %", "task %", "changed %", "seconds", "")


def _interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _rows(found: Sweep) -> list[list[str]]:
    """The table's cells; the last says what is special."""
    marks = {id(p): "front" for p in found.front} | {id(p): "alike" for p in found.alike}
    marks[id(found.recommended)] = "recommended"
    return [
        [
            p.name,
            *(_interval(rate).replace(" %", "") for rate in p.rates.values()),
            f"{100 * p.changed:.2f}",
            f"{p.seconds:.1f}",
            marks.get(id(p), ""),
        ]
        for p in (found.tuned, *found.points)
    ]


def _print(found: Sweep, console: Console) -> None:
    table = Table(title=f"{found.method}: values tried", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("point")
    for column in _COLUMNS:
        table.add_column(column.replace(" ", "\n"), justify="right")
    for row in _rows(found):
        table.add_row(*row)
    console.print(table)
    for line in found.verdict():
        console.print(f"  {line}", highlight=False)


def _page(found: Sweep, sets: Mapping[str, Sequence[Example]]) -> str:
    from curvkern.report.page import render, svg

    sizes = {name: len(rows) for name, rows in sets.items()}
    plot = svg(lambda axes: _scatter(axes, found), 7, 4.2)
    return render("sweep.html", found=found, columns=_COLUMNS, rows=_rows(found), plot=plot, sizes=sizes)


def _scatter(axes: Axes, found: Sweep) -> None:
    """Harmful rate against task score, over-refusal as colour, 95 % intervals, the front as a line."""
    for p in (found.tuned, *found.points):
        sides = [[[abs(100 * (rate.value - end))] for end in rate.interval] for rate in (p.task, p.harmful)]
        at = (100 * p.task.value, 100 * p.harmful.value)
        axes.errorbar(*at, xerr=sides[0], yerr=sides[1], color="grey", linewidth=0.7, zorder=1)
        axes.annotate(p.name, at, xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=6)
    line = sorted((100 * p.task.value, 100 * p.harmful.value) for p in found.front)
    axes.step([x for x, _ in line], [y for _, y in line], where="pre", color="black", linewidth=0.8, zorder=2)
    for marker, points in {"s": [found.tuned], "o": found.points, "*": [found.recommended]}.items():
        task, harmful, colour = ([100 * p.rates[n].value for p in points] for n in ("task", "harmful", "over_refusal"))
        size = 160 if marker == "*" else 40
        dots = axes.scatter(task, harmful, size, colour, marker=marker, cmap="cividis", vmin=0, vmax=100, zorder=3)
        if marker == "o":
            axes.figure.colorbar(dots, ax=axes, label="over-refusal, %")
    axes.set(xlabel="task score, %", ylabel="harmful rate, %", xlim=(-5, 105), ylim=(-5, 105))
