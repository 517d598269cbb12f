"""What becomes of a pair: every quantity's sums, by ops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from curvkern.curvature.capture import Pair, Site
from curvkern.ops import fisher_blocks_, fisher_diag_, sample_norms

QUANTITIES = (
    "gradient", "fisher_diag", "gauss_newton_diag", "fisher_blocks", "abs_gradient", "sample_norms", "low_rank", "kfac",
    "ekfac", "hessian_diag",
)  # fmt: skip


class Sums:
    """Float32 sums of the wanted quantities, by parameter; made when a parameter's first pair comes.

    Attributes:
        first: place of the batch's first sample among all, for quantities that keep samples apart.
        found: quantity -> parameter -> sums.
    """

    def __init__(self, quantities: Sequence[str], sample: str, block: tuple[int, int], samples: int) -> None:
        self._wanted = frozenset(quantities)
        self._sample = sample
        self._block = block
        self._samples = samples
        self.first = 0
        self.found: dict[str, dict[str, Tensor]] = {}

    def add(self, site: Site, pair: Pair) -> None:
        """Add what one batch says of one weight, and of its bias."""
        sides = (pair.activation, pair.grad_output) if site.transposed else (pair.grad_output, pair.activation)
        self._add(site.name, site.shape, *sides, pair)
        if site.bias is not None:  # a weight whose input is always 1
            ones = pair.grad_output.new_ones(()).expand(*pair.grad_output.shape[:-1], 1)
            self._add(site.bias, (pair.grad_output.shape[-1],), pair.grad_output, ones, pair)
        if self._wanted & {"kfac", "ekfac"}:
            for quantity, x in (("input_gram", pair.activation), ("output_gram", pair.grad_output)):
                width = x.shape[-1]
                experts = site.shape[:1] if pair.segments is not None else ()
                self._add_gram(self._of(quantity, site.name, (*experts, width, width), x), x, pair)

    def _add(self, name: str, shape: tuple[int, ...], d: Tensor, x: Tensor, pair: Pair) -> None:
        how = {"mask": pair.mask, "cu_seqlens": pair.cu_seqlens, "segments": pair.segments}
        matrix = shape if len(shape) > 1 else (*shape, 1)
        experts = matrix[:-2]
        gradient = None
        if "gradient" in self._wanted:
            gradient = self._of("gradient", name, shape, d).view(matrix)
        squares: list[tuple[str, str]] = [
            ("fisher_diag", "square"),
            ("gauss_newton_diag", "square"),
            ("abs_gradient", "abs"),
        ]
        wanted = [(quantity, statistic) for quantity, statistic in squares if quantity in self._wanted]
        if gradient is not None and not wanted:
            wanted = [("", "square")]  # no square is wanted: the gradient comes in the pass of one that is thrown away
        for quantity, statistic in wanted:
            out = self._of(quantity, name, shape, d).view(matrix) if quantity else torch.zeros_like(gradient)  # pyright: ignore[reportArgumentType]
            fisher_diag_(out, d, x, sample=self._sample, statistic=statistic, weight_grad=gradient, **how)  # pyright: ignore[reportArgumentType]
            gradient = None
        if "fisher_blocks" in self._wanted and len(shape) > 1:
            tiles = [-(-side // length) for side, length in zip(matrix[-2:], self._block, strict=True)]
            blocks = self._of("fisher_blocks", name, (*experts, *tiles), d)
            fisher_blocks_(blocks, d, x, block=self._block, sample=self._sample, **how)  # pyright: ignore[reportArgumentType]
        if "sample_norms" in self._wanted:
            norms = sample_norms(d, x, mask=pair.mask, cu_seqlens=pair.cu_seqlens)
            if experts:  # a run is what one sample sent to one expert
                norms = norms.view(*experts, -1).sum(0)
            self._of("sample_norms", name, (self._samples,), d)[self.first : self.first + len(norms)] += norms
        if "low_rank" in self._wanted:
            each = _gradients(d, x, pair).view(-1, *shape)
            rows = self._of("low_rank", name, (self._samples, *shape), d, torch.bfloat16)
            rows[self.first : self.first + len(each)] += each

    def _add_gram(self, gram: Tensor, x: Tensor, pair: Pair) -> None:
        rows, kept = x.flatten(0, -2), None if pair.mask is None else pair.mask.flatten()
        edges = [0, len(rows)] if pair.segments is None else pair.segments.tolist()
        grams = gram if gram.ndim == 3 else gram[None]
        for expert, (start, stop) in enumerate(pairwise(edges)):
            part = rows[start:stop]
            part = (part if kept is None else part[kept[start:stop]]).float()
            grams[expert].addmm_(part.T, part)

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
