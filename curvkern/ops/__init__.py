"""The ops: fused kernels on weights, activations and gradients, each with a plain torch definition beside it."""

from curvkern.ops.rollback import blend_, blend_ref, rollback_, rollback_ref, undo_
from curvkern.ops.select import Threshold, gate_ref, pack_mask, score_ref, unpack_mask
from curvkern.ops.subspace import (
    AlignmentScores,
    alignment_map,
    alignment_map_ref,
    alignment_penalty,
    alignment_penalty_ref,
    alignment_scores,
    alignment_scores_ref,
    delta_floor,
    project_,
    project_ref,
    subspace_basis,
    subspace_basis_ref,
)

__all__ = [
    "AlignmentScores",
    "Threshold",
    "alignment_map",
    "alignment_map_ref",
    "alignment_penalty",
    "alignment_penalty_ref",
    "alignment_scores",
    "alignment_scores_ref",
    "blend_",
    "blend_ref",
    "delta_floor",
    "gate_ref",
    "pack_mask",
    "project_",
    "project_ref",
    "rollback_",
    "rollback_ref",
    "score_ref",
    "subspace_basis",
    "subspace_basis_ref",
    "undo_",
    "unpack_mask",
]
