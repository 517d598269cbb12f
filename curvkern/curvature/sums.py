"""What becomes of a pair: every quantity's sums, by ops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from curvkern.curvature.capture import Pair, Site
from curvkern.curvature.hidden import CurvatureError
from curvkern.ops import fisher_blocks_, fisher_diag_, gram_, sample_norms

QUANTITIES = (
    "gradient", "fisher_diag", "gauss_newton_diag", "fisher_blocks", "abs_gradient", "sample_norms", "low_rank",
    "input_gram", "kfac", "ekfac", "hessian_diag",
)  # fmt: skip
#: What becomes of each sample's gradient.
_SQUARES = {"fisher_diag": "square", "gauss_newton_diag": "square", "abs_gradient": "abs"}

#: Sides of tiles, or "row", "column", "module".
Block = tuple[int, int] | str


class Sums:
    """Float32 sums of the wanted quantities, by parameter; made when a parameter's first pair comes.

    Attributes:
        first: place of the batch's first sample among all, for quantities that keep samples apart.
        found: quantity -> parameter -> sums.
    """

    def __init__(self, quantities: Sequence[str], sample: str, block: Block, samples: int) -> None:
        self._wanted = frozenset(quantities)
        self._sample = sample
        self._block = block
        self._samples = samples
        self.first = 0
        self.found: dict[str, dict[str, Tensor]] = {}
        self._last: tuple[Tensor, str] | None = None
        self._sharing: dict[str, str] = {}

    def add(self, site: Site, pair: Pair) -> None:
        """Add what one batch says of one weight, and of its bias."""
        if site.kind == "norm":
            self._add_each(site, pair)
            return
        sides = (pair.activation, pair.grad_output) if site.transposed else (pair.grad_output, pair.activation)
        if pair.rows is None:
            self._add(site.name, site.shape, *sides, pair)
        else:
            self._add_rows(site, pair.rows, pair)
        if site.bias is not None:  # a weight whose input is always 1
            ones = pair.grad_output.new_ones(()).expand(*pair.grad_output.shape[:-1], 1)
            self._add(site.bias, (pair.grad_output.shape[-1],), pair.grad_output, ones, pair)
        if site.kind == "embedding":
            return
        if self._wanted & {"kfac", "ekfac", "input_gram"}:
            self._add_input_gram(site, pair)
        if self._wanted & {"kfac", "ekfac"}:
            self._add_gram(self._gram_of("output_gram", site, pair.grad_output, pair), pair.grad_output, pair)

    def _add(self, name: str, shape: tuple[int, ...], d: Tensor, x: Tensor, pair: Pair) -> None:
        how = {"mask": pair.mask, "cu_seqlens": pair.cu_seqlens, "segments": pair.segments}
        matrix = shape if len(shape) > 1 else (*shape, 1)
        experts = matrix[:-2]
        gradient = None
        if "gradient" in self._wanted:
            gradient = self._of("gradient", name, shape, d).view(matrix)
        wanted = [(quantity, statistic) for quantity, statistic in _SQUARES.items() if quantity in self._wanted]
        if gradient is not None and not wanted:
            wanted = [("", "square")]  # no square is wanted: the gradient comes in the pass of one that is thrown away
        for quantity, statistic in wanted:
            out = self._of(quantity, name, shape, d).view(matrix) if quantity else torch.zeros_like(gradient)  # pyright: ignore[reportArgumentType]
            fisher_diag_(out, d, x, sample=self._sample, statistic=statistic, weight_grad=gradient, **how)  # pyright: ignore[reportArgumentType]
            gradient = None
        if "fisher_blocks" in self._wanted and len(shape) > 1:
            sides = tile(self._block, *matrix[-2:])
            tiles = [-(-side // length) for side, length in zip(matrix[-2:], sides, strict=True)]
            blocks = self._of("fisher_blocks", name, (*experts, *tiles), d)
            fisher_blocks_(blocks, d, x, block=sides, sample=self._sample, **how)  # pyright: ignore[reportArgumentType]
        if "sample_norms" in self._wanted:
            norms = sample_norms(d, x, mask=pair.mask, cu_seqlens=pair.cu_seqlens)
            if experts:  # a run is what one sample sent to one expert
                norms = norms.view(*experts, -1).sum(0)
            self._rows("sample_norms", name, norms)
        if "low_rank" in self._wanted:
            self._rows("low_rank", name, _gradients(d, x, pair).view(-1, *shape))

    def _add_rows(self, site: Site, rows: Tensor, pair: Pair) -> None:
        """Of an embedding: sums over the rows that occur, put where they belong."""
        part = Sums([*self._wanted & {"gradient", "sample_norms", *_SQUARES}], self._sample, self._block, self._samples)
        part.first = self.first
        part._add(site.name, (len(rows), site.shape[1]), pair.grad_output, pair.activation, pair)
        for quantity, of in part.found.items():
            if quantity == "sample_norms":
                self._of(quantity, site.name, (self._samples,), rows).add_(of[site.name])
            else:
                self._of(quantity, site.name, site.shape, rows).index_add_(0, rows, of[site.name])

    def _add_each(self, site: Site, pair: Pair) -> None:
        """Of a norm, whose weight acts on each feature by itself: G = sum over tokens of grad * slope."""
        kept = cast("Tensor", pair.mask)[(..., *[None] * (pair.grad_output.ndim - 2))]
        d, x = (torch.where(kept, side.float(), 0.0) for side in (pair.grad_output, pair.activation))
        for name, each in ((site.name, d * x), (site.bias, d)):
            if name is None:
                continue
            tokens = each.flatten(2, -2).sum(2) if each.ndim > 3 else each
            samples = tokens.sum(1)
            squared = {"sequence": samples, "token": tokens.flatten(0, 1), "batch": samples.sum(0, keepdim=True)}
            sums = {quantity: squared[self._sample] for quantity in _SQUARES if quantity in self._wanted}
            for quantity, grads in sums.items():
                found = grads.abs() if _SQUARES[quantity] == "abs" else grads.square()
                self._of(quantity, name, site.shape, d).add_(found.sum(0))
            if "gradient" in self._wanted:
                self._of("gradient", name, site.shape, d).add_(samples.sum(0))
            if "sample_norms" in self._wanted:
                self._rows("sample_norms", name, samples.square().sum(1))
            if "low_rank" in self._wanted:
                self._rows("low_rank", name, samples)

    def _rows(self, quantity: str, name: str, rows: Tensor) -> None:
        """Add to a quantity's rows of the batch's samples."""
        dtype = torch.bfloat16 if quantity == "low_rank" else torch.float32
        held = self._of(quantity, name, (self._samples, *rows.shape[1:]), rows, dtype)
        held[self.first : self.first + len(rows)] += rows

    def _add_input_gram(self, site: Site, pair: Pair) -> None:
        """The Gram of the inputs; modules that are given the same inputs, one after the other, share one."""
        x, held = pair.activation, self.found.setdefault("input_gram", {})
        if self._last is not None and _same(self._last[0], x) and pair.segments is None:
            shared = self._last[1]
            if held.setdefault(site.name, held[shared]) is held[shared]:
                self._sharing[site.name] = shared
                return
        if site.name in self._sharing:
            raise CurvatureError(
                f"estimate: {site.name} had its inputs in common with {self._sharing[site.name]} in one batch and "
                "not in another; leave one of them out with exclude"
            )
        self._add_gram(self._gram_of("input_gram", site, x, pair), x, pair)
        self._last = x, site.name

    def _gram_of(self, quantity: str, site: Site, x: Tensor, pair: Pair) -> Tensor:
        experts = site.shape[:1] if pair.segments is not None else ()
        return self._of(quantity, site.name, (*experts, x.shape[-1], x.shape[-1]), x)

    def _add_gram(self, gram: Tensor, x: Tensor, pair: Pair) -> None:
        rows, kept = x.flatten(0, -2), None if pair.mask is None else pair.mask.flatten()
        edges = [0, len(rows)] if pair.segments is None else pair.segments.tolist()
        grams = gram if gram.ndim == 3 else gram[None]
        for expert, (start, stop) in enumerate(pairwise(edges)):
            gram_(grams[expert], rows[start:stop], mask=None if kept is None else kept[start:stop])

    def _of(
        self, quantity: str, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        held = self.found.setdefault(quantity, {})
        if name not in held:
            held[name] = torch.zeros(*shape, dtype=dtype, device=like.device)
        return held[name]

    def names(self) -> Iterator[str]:
        """The parameters that something was added to."""
        return iter({name for of in self.found.values() for name in of})


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def tile(block: Block, rows: int, cols: int) -> tuple[int, int]:
    """Sides of the tiles of a weight [rows, cols]."""
    named = {"row": (1, cols), "column": (rows, 1), "module": (rows, cols)}
    return named[block] if isinstance(block, str) else block


class RotatedSums:
    r"""EK-FAC: the diagonal Fisher in the eigenbasis of the K-FAC factors, from rotated inputs.

    With :math:`G_n = \sum_t d_t x_t^\top`, the entries of :math:`U_S^\top G_n U_A` are those of a gradient of
    :math:`U_S^\top d_t` and :math:`U_A^\top x_t`: no gradient is formed or rotated. (George et al. 2018, 1806.03884.)

    Attributes:
        first: as in `Sums`; of no use here.
        found: ``input_basis`` and ``output_basis`` (columns: eigenvectors, eigenvalues ascending), ``ekfac``.
    """

    def __init__(self, found: Mapping[str, Mapping[str, Tensor]], sample: str) -> None:
        self._sample = sample
        self.first = 0
        names = {"input_basis": "input_gram", "output_basis": "output_gram"}
        bases = {basis: {n: torch.linalg.eigh(g)[1] for n, g in found[gram].items()} for basis, gram in names.items()}
        self.found: dict[str, dict[str, Tensor]] = {**bases, "ekfac": {}}

    def add(self, site: Site, pair: Pair) -> None:
        """Add the squares of one batch."""
        bases = [self.found[basis][site.name] for basis in ("output_basis", "input_basis")]
        d, x = (_rotated(y, u, pair) for y, u in zip((pair.grad_output, pair.activation), bases, strict=True))
        held = self.found["ekfac"]
        if site.name not in held:
            shape = (*bases[0].shape[:-2], bases[0].shape[-1], bases[1].shape[-1])
            held[site.name] = torch.zeros(shape, device=d.device)
        how = {"mask": pair.mask, "cu_seqlens": pair.cu_seqlens, "segments": pair.segments}
        fisher_diag_(held[site.name], d, x, sample=self._sample, **how)  # pyright: ignore[reportArgumentType]

    def names(self) -> Iterator[str]:
        """The parameters that something was added to."""
        return iter(self.found["ekfac"])


def _rotated(x: Tensor, basis: Tensor, pair: Pair) -> Tensor:
    """Tokens times basis in float32, of each expert's tokens by its own basis."""
    if pair.segments is None:
        return x.float() @ basis
    edges = pair.segments.tolist()
    parts = [x[start:stop].float() @ u for (start, stop), u in zip(pairwise(edges), basis, strict=True)]
    return torch.cat([*parts, x[edges[-1] :].float() @ basis[0]])


def _gradients(d: Tensor, x: Tensor, pair: Pair) -> Tensor:
    """Each sample's gradient [n, ..., out, in], in the dtype of the inputs."""
    if pair.cu_seqlens is None or pair.segments is None:
        kept = d if pair.mask is None else d * pair.mask[..., None]
        return torch.einsum("nto,nti->noi", kept, x)
    experts = len(pair.segments) - 1
    runs = [d[start:stop].T @ x[start:stop] for start, stop in pairwise(pair.cu_seqlens.tolist())]
    return torch.stack(runs).unflatten(0, (experts, -1)).transpose(0, 1)
