"""The ops: fused kernels on weights, activations and gradients, each with a plain torch definition beside it."""

from curvkern.ops.alignment_scores import AlignmentScores, alignment_scores, alignment_scores_ref
from curvkern.ops.delta import delta_floor
from curvkern.ops.fisher import (
    fisher_blocks_,
    fisher_blocks_ref,
    fisher_diag_,
    fisher_diag_ref,
)
from curvkern.ops.gram import (
    FactorReport,
    column_sumsq_,
    column_sumsq_ref,
    gram_,
    gram_ref,
    inverse_factor,
)
from curvkern.ops.hessian import (
    gnb_diag_,
    gnb_diag_ref,
    hutchinson_,
    hutchinson_ref,
    rademacher_,
    rademacher_ref,
)
from curvkern.ops.loss import (
    hidden_cosine_loss,
    kl_to_reference,
    kl_to_reference_ref,
    weighted_cross_entropy,
    weighted_cross_entropy_ref,
)
from curvkern.ops.obs import obs_sweep_, obs_sweep_ref
from curvkern.ops.perturb import BallUndo, ball_perturb_, perturb_, perturb_ref
from curvkern.ops.philox import normals_ref, philox_ref, signs_ref
from curvkern.ops.rollback import blend_, blend_ref, rollback_, rollback_ref, undo_
from curvkern.ops.sample_products import sample_dots, sample_dots_ref, sample_norms, sample_norms_ref
from curvkern.ops.score import gate_ref, pack_mask, score_key_ref, score_of_key, score_ref, unpack_mask
from curvkern.ops.select import block_select, block_select_ref, score_histogram_, score_histogram_ref
from curvkern.ops.selector import Selector, Threshold
from curvkern.ops.subspace import (
    alignment_map,
    alignment_map_ref,
    alignment_penalty,
    alignment_penalty_ref,
    project_,
    project_ref,
    subspace_basis,
    subspace_basis_ref,
)

__all__ = [
    "AlignmentScores",
    "BallUndo",
    "FactorReport",
    "Selector",
    "Threshold",
    "alignment_map",
    "alignment_map_ref",
    "alignment_penalty",
    "alignment_penalty_ref",
    "alignment_scores",
    "alignment_scores_ref",
    "ball_perturb_",
    "blend_",
    "blend_ref",
    "block_select",
    "block_select_ref",
    "column_sumsq_",
    "column_sumsq_ref",
    "delta_floor",
    "fisher_blocks_",
    "fisher_blocks_ref",
    "fisher_diag_",
    "fisher_diag_ref",
    "gate_ref",
    "gnb_diag_",
    "gnb_diag_ref",
    "gram_",
    "gram_ref",
    "hidden_cosine_loss",
    "hutchinson_",
    "hutchinson_ref",
    "inverse_factor",
    "kl_to_reference",
    "kl_to_reference_ref",
    "normals_ref",
    "obs_sweep_",
    "obs_sweep_ref",
    "pack_mask",
    "perturb_",
    "perturb_ref",
    "philox_ref",
    "project_",
    "project_ref",
    "rademacher_",
    "rademacher_ref",
    "rollback_",
    "rollback_ref",
    "sample_dots",
    "sample_dots_ref",
    "sample_norms",
    "sample_norms_ref",
    "score_histogram_",
    "score_histogram_ref",
    "score_key_ref",
    "score_of_key",
    "score_ref",
    "signs_ref",
    "subspace_basis",
    "subspace_basis_ref",
    "undo_",
    "unpack_mask",
    "weighted_cross_entropy",
    "weighted_cross_entropy_ref",
]
