"""Guards that keep a model's alignment while it is fine-tuned: callbacks of the Trainer, and for loops of one's own."""

from curvkern.training.align_guard import AlignGuardLoRA, geodesic_overlap, riemannian_overlap
from curvkern.training.asft import AsFT
from curvkern.training.booster import Booster
from curvkern.training.derta import derta_loss, derta_rows
from curvkern.training.freezing import Frozen, freeze
from curvkern.training.gradient_surgery import GradientSurgery, Surgery
from curvkern.training.lookahead import lookahead
from curvkern.training.proximal import Alternate, ProximalStep
from curvkern.training.reference_kl import ReferenceKL
from curvkern.training.safety_probe import SafetyProbe, contrast_loss
from curvkern.training.star_dss import chunk_ends, star_dss_loss, token_log_probs, token_safety
from curvkern.training.vaccine import Vaccine
from curvkern.training.weight_ema import WeightEMA

__all__ = [
    "AlignGuardLoRA",
    "Alternate",
    "AsFT",
    "Booster",
    "Frozen",
    "GradientSurgery",
    "ProximalStep",
    "ReferenceKL",
    "SafetyProbe",
    "Surgery",
    "Vaccine",
    "WeightEMA",
    "chunk_ends",
    "contrast_loss",
    "derta_loss",
    "derta_rows",
    "freeze",
    "geodesic_overlap",
    "lookahead",
    "riemannian_overlap",
    "star_dss_loss",
    "token_log_probs",
    "token_safety",
]
