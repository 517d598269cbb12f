"""Statistics of a model as one self-contained HTML page: where curvature lies, and how it overlaps with another's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from curvkern.report.page import COLOURS, render, svg

Sums = Mapping[str, Mapping[str, Tensor]]

DIAGONALS = ("fisher_diag", "gauss_newton_diag", "ekfac", "hessian_diag", "abs_gradient")
_LARGEST_SPECTRUM = 2048  # side; larger factors take minutes each


def render_statistics(title: str, sums: Sums, facts: Mapping[str, Any], against: Sums | None = None) -> str:
    """The page as HTML.

    Args:
        title: what was measured.
        sums: quantity -> parameter -> tensor.
        facts: choices and counts, as a table.
        against: statistics of other data, to compare with.
    """
    plots: list[str] = []
    diagonals = [quantity for quantity in DIAGONALS if quantity in sums]
    for quantity in diagonals:
        plots.append(svg(lambda axes, q=quantity: _heat(axes, q, sums[q]), 7, 4))
    if diagonals:
        plots.append(svg(lambda axes: _concentration(axes, {q: sums[q] for q in diagonals}), 7, 3))
    if "input_gram" in sums:
        for gram in ("input_gram", "output_gram"):
            plots.append(svg(lambda axes, g=gram: _spectra(axes, g, sums[g]), 7, 3))
    shared = [q for q in (*diagonals, "gradient") if q in sums and against is not None and q in against]
    for quantity in shared:
        plots.append(svg(lambda axes, q=quantity: _overlap(axes, q, sums[q], (against or {})[q]), 7, 3))
    return render("statistics.html", title=title, plots=plots, facts=facts, rows=_rows(sums))


def concentration(of: Mapping[str, Tensor], bins: int = 4096) -> tuple[list[float], list[float]]:
    """(share of weights, share of the trace in the largest that are so many), by magnitude; ends at (1, 1).

    Counted by the bins of a logarithmic histogram: all values are never sorted, or in one place.
    """
    counts, totals = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)
    for tensor in of.values():
        values = tensor.detach().float().abs().flatten().cpu()
        at = ((values.clamp(min=1e-38).log10() + 38) * (bins - 1) / 76).long().clamp(0, bins - 1)
        counts += torch.bincount(at, minlength=bins)
        totals += torch.bincount(at, weights=values.double(), minlength=bins)
    down, up = counts.flip(0).cumsum(0), totals.flip(0).cumsum(0)
    kept = counts.flip(0) > 0
    return (down[kept] / down[-1].clamp(min=1)).tolist(), (up[kept] / up[-1].clamp(min=1e-300)).tolist()


def _place(name: str) -> tuple[int, str]:
    """(layer, kind) of a parameter's name."""
    number = re.search(r"\.(\d+)\.", name)
    kind = name[number.end() :] if number else name
    return (int(number[1]) if number else 0), kind.removesuffix(".weight")


def _heat(axes: Axes, quantity: str, of: Mapping[str, Tensor]) -> None:
    kinds = list(dict.fromkeys(_place(name)[1] for name in of))
    layers = sorted({_place(name)[0] for name in of})
    grid = [[math.nan] * len(layers) for _ in kinds]
    for name, tensor in of.items():
        layer, kind = _place(name)
        mean = tensor.double().abs().mean().item()
        grid[kinds.index(kind)][layers.index(layer)] = math.log10(mean) if mean > 0 else math.nan
    image = axes.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=6)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=6)
    axes.set(xlabel="layer", title=f"{quantity}: mean magnitude of a weight's, log10")
    axes.figure.colorbar(image, ax=axes)


def _concentration(axes: Axes, diagonals: Sums) -> None:
    for colour, (quantity, of) in zip(COLOURS, diagonals.items(), strict=False):
        share, trace = concentration(of)
        axes.plot([100 * s for s in share], [100 * t for t in trace], color=colour, label=quantity)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="largest weights, % of all", ylabel="% of the sum", title="How much lies in how few weights")
    axes.set_xscale("log")
    axes.legend(fontsize=7)


def _spectra(axes: Axes, quantity: str, of: Mapping[str, Tensor]) -> None:
    left_out = 0
    for name, gram in of.items():
        if gram.ndim != 2 or gram.shape[0] > _LARGEST_SPECTRUM:
            left_out += 1
            continue
        values = torch.linalg.eigvalsh(gram.double().cpu()).flip(0).clamp(min=0)
        share = (values / values.sum().clamp(min=1e-300)).tolist()
        axes.plot(
            [(i + 1) / len(share) for i in range(len(share))], share, color=COLOURS[_place(name)[0] % 8], alpha=0.5
        )
    left = f", {left_out} of experts or of more than {_LARGEST_SPECTRUM} left out" if left_out else ""
    axes.set(xlabel="eigenvalue, largest first, share of the side", ylabel="share of the trace")
    axes.set_title(f"{quantity}: spectra{left}", fontsize=9)
    axes.set_yscale("log")


def _overlap(axes: Axes, quantity: str, of: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    kinds = list(dict.fromkeys(_place(name)[1] for name in of if name in other))
    for colour, kind in zip(COLOURS * 9, kinds, strict=False):
        points = sorted(
            (_place(name)[0], cosine(tensor, other[name]))
            for name, tensor in of.items()
            if name in other and _place(name)[1] == kind
        )
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=kind, markersize=3)
    axes.set(xlabel="layer", ylabel="cosine", title=f"{quantity}: overlap with the other data")
    axes.legend(fontsize=6, ncols=4)


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two tensors of one shape, as vectors; 0 with a zero one."""
    a, b = one.detach().double().flatten().cpu(), other.detach().double().flatten().cpu()
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else 0.0


def _rows(sums: Sums) -> list[dict[str, Any]]:
    return [
        {
            "quantity": quantity,
            "name": name,
            "shape": "x".join(map(str, tensor.shape)),
            "sum": tensor.double().sum().item(),
        }
        for quantity, of in sums.items()
        for name, tensor in of.items()
    ]
