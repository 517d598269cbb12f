"""How updates stand to the alignment direction: scores from r x r Grams, over subspace's `alignment_map`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from curvkern.backend import check
from curvkern.ops.delta import row_slices, wide
from curvkern.ops.subspace import alignment_map, alignment_map_ref, check_update, over, same_length

TOGETHER = 32  # modules whose factors lie side by side in float64


class AlignmentScores(NamedTuple):
    r"""How an update stands to the alignment direction; 0-dim tensors, [m] for m updates.

    Attributes:
        cosine: of the update and its image under C, in [0, 1] up to rounding. An update unrelated to a V of
            independent entries has about :math:`\sqrt{i / (i + o)}`: compare modules of one shape.
        shrink: norm of the image over norm of the update.
        distance: norm of image minus update.
    """

    cosine: Tensor
    shrink: Tensor
    distance: Tensor


@overload
def alignment_scores(
    B: Tensor, A: Tensor | None, aligned: Tensor, base: Tensor, *, backend: str = "auto"
) -> AlignmentScores: ...
@overload
def alignment_scores(
    B: Sequence[Tensor], A: Sequence[Tensor], aligned: Sequence[Tensor], base: Sequence[Tensor], *,
    backend: str = "auto",
) -> AlignmentScores: ...  # fmt: skip
def alignment_scores(B: Any, A: Any, aligned: Any, base: Any, *, backend: str = "auto") -> AlignmentScores:
    r"""Cosine, shrink and distance of an update :math:`\Delta = BA` and its image :math:`C\Delta` (`alignment_map`).

    With :math:`Y = CB` and :math:`G = AA^T`, :math:`\langle C\Delta, \Delta\rangle = \mathrm{tr}(Y^T B\,G)` and so on:
    neither is formed. A LoRA scale would change the distance alone, in proportion.

    Args:
        B: [o, r], any floating dtype; or, with ``A=None``, a whole update [o, i]. Or a list of B, one for each module
            of a model, beside lists of the others: on a GPU a handful of launches for all.
        A: [r, i], any floating dtype; or None; or a list.
        aligned: weight [o, i] of the aligned model, see `alignment_map`; or a list.
        base: the same weight before alignment; or a list.
        backend: see `use`.

    Returns:
        `AlignmentScores` in float32 (float64 if any input is), [m] for lists. Cosine and shrink are 0 where update or
        image is.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Source: the cosine is Safe LoRA's (2405.16833, eq. 3). Deterministic.
    """
    if not isinstance(B, Tensor):
        return _scores_of_all(**same_length("alignment_scores", B=B, A=A, aligned=aligned, base=base), backend=backend)
    check.no_grad("alignment_scores", B=B, A=A, aligned=aligned, base=base)
    check_update("alignment_scores", B, A, aligned, base)
    y, _ = alignment_map(B, aligned, base, backend=backend)
    gram = None if A is None else A.double() @ A.double().mT
    sums = torch.zeros(4, dtype=torch.float64, device=B.device)
    for rows in row_slices(B, torch.float64):
        sums += _products(y[rows].double(), B[rows].double(), gram)
    return AlignmentScores(*(score.to(y.dtype) for score in _scores(sums)))


def _scores_of_all(
    B: list[Tensor], A: list[Tensor], aligned: list[Tensor], base: list[Tensor], backend: str
) -> AlignmentScores:
    """`alignment_scores` of lists; the small products are batched too, `TOGETHER` modules of one shape at a time."""
    if not B:
        return AlignmentScores(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    alike: dict[Any, list[int]] = {}
    for at, (b, a, *weights) in enumerate(zip(B, A, aligned, base, strict=True)):
        check.no_grad("alignment_scores", A=a)
        check_update("alignment_scores", b, a, *weights)
        alike.setdefault((b.shape, a.shape), []).append(at)
    y, norm = alignment_map(B, aligned, base, backend=backend)
    sums = torch.empty(4, len(B), dtype=torch.float64, device=norm.device)
    for members in alike.values():
        for start in range(0, len(members), TOGETHER):
            few = members[start : start + TOGETHER]
            image, update, right = (torch.stack([of[at].double() for at in few]) for of in (y, B, A))
            sums[:, few] = _products(image, update, right @ right.mT)
    return AlignmentScores(*(score.to(norm.dtype) for score in _scores(sums)))


def _products(image: Tensor, update: Tensor, gram: Tensor | None) -> Tensor:
    """<image, update>, |image|^2, |update|^2, |image - update|^2; with ``gram`` = A A^T those of image A, update A."""
    gap = image - update
    pairs = ((image, update), (image, image), (update, update), (gap, gap))
    return torch.stack([(p * q if gram is None else p.mT @ q * gram).sum((-2, -1)) for p, q in pairs])


def _scores(products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine, shrink and distance from `_products`."""
    inner, image, update, gap = products.clamp_min(0).unbind()
    return over(inner, image.sqrt() * update.sqrt()), over(image.sqrt(), update.sqrt()), gap.sqrt()


def alignment_scores_ref(B: Tensor, A: Tensor | None, aligned: Tensor, base: Tensor) -> AlignmentScores:
    """The definition of `alignment_scores`, in plain torch: update and image are formed."""
    dtype = wide(B, A, aligned, base)
    update = B.to(dtype) if A is None else B.to(dtype) @ A.to(dtype)
    return AlignmentScores(*_scores(_products(alignment_map_ref(update, aligned, base)[0], update, None)))
