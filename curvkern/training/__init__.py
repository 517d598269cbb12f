"""Guards that keep a model's alignment while it is fine-tuned."""

from curvkern.training.align_guard import AlignGuardLoRA, geodesic_overlap, riemannian_overlap
from curvkern.training.asft import AsFT
from curvkern.training.derta import derta_loss, derta_rows
from curvkern.training.lookahead import lookahead
from curvkern.training.star_dss import chunk_ends, star_dss_loss, token_log_probs, token_safety

__all__ = [
    "AlignGuardLoRA",
    "AsFT",
    "chunk_ends",
    "derta_loss",
    "derta_rows",
    "geodesic_overlap",
    "lookahead",
    "riemannian_overlap",
    "star_dss_loss",
    "token_log_probs",
    "token_safety",
]
