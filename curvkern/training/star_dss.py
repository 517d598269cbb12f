r"""STAR-DSS: imitate the safe parts of a response, stay near the aligned model on the others."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvkern.backend import check
from curvkern.ops import weighted_cross_entropy
from curvkern.ops.token_loss import IGNORED, token_loss

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def chunk_ends(response: str, words: int = 5) -> list[int]:
    """Where the chunks of a response end: every so many words, and at its end.

    A guard model scores ``response[:end]`` of each: the probability that it is safe as an answer to the prompt.

    Args:
        response: text.
        words: a chunk; the last may be shorter.

    Returns:
        Character positions, ascending; the last is ``len(response)``. None for a response without words.

    Raises:
        ValueError: words is below 1.
    """
    check.at_least("chunk_ends", "words", words, 1)
    ends = [word.end() for word in re.finditer(r"\S+", response)]
    return [*ends[words - 1 : -1 : words], len(response)] if ends else []


def token_safety(offsets: Sequence[tuple[int, int]], ends: Sequence[int], scores: Sequence[float]) -> Tensor:
    """Every token's safety: the score of the chunk in which it starts.

    Args:
        offsets: (start, stop) of each token in the response, as a fast tokenizer's ``return_offsets_mapping`` says for
            the response alone. Lengths of tokenized prefixes would not do: they do not add up.
        ends: of the chunks, see `chunk_ends`.
        scores: one a chunk, in [0, 1]; of several guards their mean.

    Returns:
        float32 [tokens]. Tokens that start after the last end (an end of turn) have the last score.

    Raises:
        ValueError: not one score for each chunk, none at all, a score outside [0, 1], or ends that do not ascend.
    """
    if len(ends) != len(scores) or not ends:
        raise ValueError(f"token_safety: {len(ends)} ends but {len(scores)} scores; wanted one score for each chunk.")
    bad = [score for score in scores if not 0 <= score <= 1]
    if bad:
        raise ValueError(f"token_safety: scores has {bad[0]}; wanted probabilities of being safe, in [0, 1].")
    if list(ends) != sorted(set(ends)):
        raise ValueError("token_safety: ends do not ascend; pass what chunk_ends gave.")
    starts = torch.tensor([start for start, _ in offsets], dtype=torch.long)
    chunk = torch.bucketize(starts, torch.tensor(ends), right=True).clamp(max=len(ends) - 1)
    return torch.tensor(scores, dtype=torch.float32)[chunk]


@torch.no_grad()
def token_log_probs(logits: Tensor, labels: Tensor, *, backend: str = "auto") -> Tensor:
    """What a causal model says each label's log probability is: of the aligned model, the reference of `star_dss_loss`.

    Args:
        logits: [n, t, vocabulary]; float32, float16, bfloat16, float64.
        labels: int64 [n, t]: the token itself where it counts, else -100. Shifted here: logits k predict label k + 1.
        backend: see `curvkern.use`.

    Returns:
        float32 (float64 for float64) [n, t], at the label's place; 0 where it is -100 and at the first place.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    _check("token_log_probs", logits, labels)
    return pad(_log_probs(logits, _next(labels, IGNORED), backend)[:, :-1], (1, 0))


def star_dss_loss(
    logits: Tensor, labels: Tensor, safety: Tensor, reference: Tensor, *,
    kl_weight: float = 0.5, num_items: Tensor | int | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""STAR-DSS, :math:`\frac1N\sum_k V_k\,\mathrm{CE}_k + (1-V_k)\,\lambda\,\tfrac12\Delta_k^2`.

    :math:`\Delta_k = \log\pi(y_k) - \log\pi_{ref}(y_k)` estimates the KL from the aligned model by the label alone. Its
    gradient is that of one cross entropy with the weights :math:`V_k - (1-V_k)\lambda\Delta_k`, of either sign.

    Args:
        logits: [n, t, vocabulary] of a causal model; float32, float16, bfloat16, float64.
        labels: int64 [n, t], -100 where a token carries no loss. Shifted here: logits k predict label k + 1.
        safety: V, floating [n, t] in [0, 1], at the place of its token (`token_safety`).
        reference: floating [n, t]: :math:`\log\pi_{ref}`, likewise (`token_log_probs`); made once, before training.
        kl_weight: lambda.
        num_items: N; None: the labels of this batch that count. Under gradient accumulation pass those of all its
            micro-batches, as the Trainer's ``num_items_in_batch`` does, and do not divide again.
        backend: see `curvkern.use`.

    Returns:
        Scalar, float32 (float64 for float64), once differentiable in logits; 0 where no label counts. No copy of the
        logits is made but their gradient. Places without a label may hold anything, NaN included.

    Raises:
        TypeError, ValueError: arguments that do not fit, or kl_weight below 0.
        RuntimeError: safety or reference requires grad under grad mode.

    Source: Shape it Up! (STAR-DSS, 2505.17196), its loss with the k2 estimate of KL. Deterministic.
    """
    op = "star_dss_loss"
    check.no_grad(op, safety=safety, reference=reference)
    _check(op, logits, labels)
    for name, tensor in {"safety": safety, "reference": reference}.items():
        check.dtype(op, name, tensor, FLOATS)
        check.shape(op, name, tensor, labels.shape, "one number a label")
        check.same_device(op, logits=logits, **{name: tensor})
    if not kl_weight >= 0:
        raise ValueError(f"{op}: kl_weight is {kl_weight}; wanted at least 0.")
    targets, v, against = _next(labels, IGNORED), _next(safety, 0), _next(reference, 0)
    counted = targets != IGNORED
    log_p = _log_probs(logits.detach(), targets, backend)
    v, against = (t.to(log_p.dtype).masked_fill(~counted, 0) for t in (v, against))
    drift = log_p - against
    total = counted.sum().clamp(min=1) if num_items is None else num_items
    weight = (v - (1 - v) * kl_weight * drift) / total
    slope = weighted_cross_entropy(logits, targets, weight, reduction="sum", backend=backend)
    value = ((1 - v) * kl_weight / 2 * drift.square() - v * log_p).sum() / total
    return slope + (value - slope).detach()


def _log_probs(logits: Tensor, targets: Tensor, backend: str) -> Tensor:
    """Log probability of each target, 0 where it is -100."""
    rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    return -token_loss(rows, flat, None, backend)[0].view(targets.shape)


def _next(of_label: Tensor, fill: float) -> Tensor:
    """What belongs to a label, at the place of the logits that predict it."""
    return pad(of_label[:, 1:], (0, 1), value=fill)


def _check(op: str, logits: Tensor, labels: Tensor) -> None:
    check.dtype(op, "logits", logits, FLOATS)
    if logits.ndim != 3:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}; wanted [n, t, vocabulary].")
    check.dtype(op, "labels", labels, (torch.int64,))
    check.shape(op, "labels", labels, logits.shape[:2], "one a place of logits")
    check.same_device(op, logits=logits, labels=labels)
