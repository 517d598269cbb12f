"""From a model's directory and JSON Lines to a file of curvature statistics."""

from __future__ import annotations

import signal
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from curvkern.curvature import Memory, Statistics
    from curvkern.evaluate import Example


def measure(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    quantity: Sequence[str] = ("fisher_diag",),
    html: str | Path | None = None,
    against: str | Path | None = None,
    device: str = "cpu",
    layerwise: bool | Literal["auto"] = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    **choices: Any,
) -> Statistics:
    """Estimate statistics of a model and save them; Ctrl-C saves what is complete.

    Of the processes that torchrun starts each runs its share of the data, and rank 0 writes; Ctrl-C ends them unsaved.

    Args:
        model: Hugging Face directory with a tokenizer, or a LoRA adapter directory.
        data: JSON Lines, each row with a response: loss is on responses alone.
        out: safetensors file to write, see `curvature.Statistics`.
        quantity: see `curvature.estimate`.
        html: page to write, with plots.
        against: statistics of other data, whose overlap with these the page shows.
        device: where the model runs; with several ranks ``"cuda"`` is a GPU for each.
        layerwise: see `curvature.estimate`.
        overwrite: replace what is at ``out``.
        resume: add the rows that the interrupted run at ``out`` left.
        progress: show a bar with the time left.
        **choices: what else `curvature.estimate` takes.

    Returns:
        What was saved; its ``counts.rows`` says how many rows of the data it covers.

    Raises:
        CurvatureError, ValueError, FileNotFoundError: inputs that are wrong or do not fit, before any heavy work.
        FileExistsError: there is something at ``out``.
    """
    from curvkern.curvature import Statistics, estimate, fits, from_answer, memory_needed
    from curvkern.curvature.ranks import Ranks, joined
    from curvkern.evaluate import load, load_tokenizer, read_jsonl

    path = Path(out).expanduser()
    if path.exists() and not (overwrite or resume):
        raise FileExistsError(f"{path}: exists; pass --overwrite to replace it, or --resume to add to it")
    page = None if html is None else Path(html).expanduser()
    for file, option in ((path, "--out"), (page, "--html")):
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"{file.absolute().parent}: no such directory; make it, or choose another {option}")
    rows = read_jsonl(data)
    _require_responses(rows, data)
    earlier = Statistics.load(path) if resume and path.exists() else None
    other = None if against is None else Statistics.load(against)
    with joined():
        ranks = Ranks()
        where: Any = ranks.device(device)
        by_layer = layerwise is True or (layerwise == "auto" and not fits(model, where))
        network, tokenizer = (Path(model), load_tokenizer(model)) if by_layer else load(model)
        if not isinstance(network, Path):
            network.to(where)
        texts = [from_answer(tokenizer, row.asked(), row.response or "") for row in rows]
        shown = progress and ranks.rank == 0
        if shown and not by_layer:
            _print_memory(memory_needed(network, texts, quantity=quantity, **_of_memory(choices)))
        patient = _patient() if ranks.count == 1 else nullcontext()
        with patient as interrupted, _bar(len(texts), shown) as tell:
            stop = None if interrupted is None else lambda: bool(interrupted)
            found = estimate(
                network, texts, quantity=quantity, tell=tell, stop=None if by_layer else stop, resume=earlier,
                layerwise=by_layer, device=where, **choices,
            )  # fmt: skip
    if ranks.rank > 0:
        return found
    found.save(path)
    if page is not None:
        from curvkern.report import render_statistics

        title = f"{', '.join(quantity)} of {Path(model).resolve().name} on {Path(data).name}"
        text = render_statistics(title, found.sums, _facts(found), None if other is None else other.sums)
        page.write_text(text, encoding="utf-8")
    return found


def _of_memory(choices: Mapping[str, Any]) -> dict[str, Any]:
    """What `memory_needed` takes of the choices of `estimate`."""
    taken = ("fisher_type", "loss", "include", "exclude", "kinds", "block", "batch_tokens", "max_length", "probes")
    return {key: choices[key] for key in taken if key in choices}


def _print_memory(memory: Memory) -> None:
    from rich.console import Console

    parts = {"statistics": memory.statistics, "activations": memory.activations, "the model": memory.model}
    told = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items())
    Console(stderr=True).print(f"memory needed: {told}", highlight=False)


def rows_of(data: str | Path) -> int:
    """How many rows a file of JSON Lines has."""
    from curvkern.evaluate import read_jsonl

    return len(read_jsonl(data))


def _require_responses(rows: Sequence[Example], data: str | Path) -> None:
    from curvkern.curvature import CurvatureError

    empty = [str(at) for at, row in enumerate(rows, 1) if row.response is None]
    if empty:
        raise CurvatureError(
            f"{data}: {len(empty)} of {len(rows)} rows have no response to put a loss on, the first are rows "
            f"{', '.join(empty[:8])}"
        )


def _facts(found: Statistics) -> dict[str, Any]:
    from dataclasses import asdict

    traces = {}
    if "hessian_trace" in found.sums:
        traces = {f"trace of {name}": f"{t:.4g} ± {e:.2g}" for name, (t, e) in found.trace_error().items()}
    return {**asdict(found.choices), **asdict(found.counts), **traces}


@contextmanager
def _patient() -> Generator[list[int]]:
    """The first Ctrl-C is noted and the batch ends; the second one interrupts."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread
        yield caught
        return
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bar(total: int, shown: bool) -> Generator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown, transient=True) as progress:
        bar = progress.add_task("rows", total=total)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
