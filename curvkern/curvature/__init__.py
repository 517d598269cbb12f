"""What data say of a model's weights: gradients and curvature of losses, gathered from the model in memory."""

from curvkern.curvature.by_layer import fits
from curvkern.curvature.capture import KINDS
from curvkern.curvature.estimate import estimate
from curvkern.curvature.hidden import CurvatureError, HiddenEvidence
from curvkern.curvature.influence import influence
from curvkern.curvature.memory import Memory, memory_needed
from curvkern.curvature.statistics import Choices, Counts, Statistics
from curvkern.curvature.texts import Text, from_answer

__all__ = [
    "KINDS",
    "Choices",
    "Counts",
    "CurvatureError",
    "HiddenEvidence",
    "Memory",
    "Statistics",
    "Text",
    "estimate",
    "fits",
    "from_answer",
    "influence",
    "memory_needed",
]
