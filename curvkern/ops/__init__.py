"""The ops: fused kernels on weights, activations and gradients, each with a plain torch definition beside it."""

from curvkern.ops.rollback import blend_, blend_ref, rollback_, rollback_ref, undo_
from curvkern.ops.select import Threshold, gate_ref, pack_mask, score_ref, unpack_mask

__all__ = [
    "Threshold",
    "blend_",
    "blend_ref",
    "gate_ref",
    "pack_mask",
    "rollback_",
    "rollback_ref",
    "score_ref",
    "undo_",
    "unpack_mask",
]
