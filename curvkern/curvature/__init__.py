"""What data say of a model's weights: gradients of losses, gathered from the model in memory."""

from curvkern.curvature.hidden import CurvatureError, HiddenEvidence

__all__ = ["CurvatureError", "HiddenEvidence"]
