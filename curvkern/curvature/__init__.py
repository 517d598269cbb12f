"""What data say of a model's weights: gradients and curvature of losses, of a model in memory or on disk."""

from curvkern.curvature.by_layer import fingerprint_of, fits, free_memory
from curvkern.curvature.capture import KINDS
from curvkern.curvature.estimate import estimate
from curvkern.curvature.hidden import CurvatureError, HiddenEvidence
from curvkern.curvature.influence import influence
from curvkern.curvature.memory import Footprint, Memory, footprint, memory_needed, statistics_of_shape
from curvkern.curvature.statistics import Choices, Counts, Statistics
from curvkern.curvature.texts import Text, from_answer

__all__ = [
    "KINDS",
    "Choices",
    "Counts",
    "CurvatureError",
    "Footprint",
    "HiddenEvidence",
    "Memory",
    "Statistics",
    "Text",
    "estimate",
    "fingerprint_of",
    "fits",
    "footprint",
    "free_memory",
    "from_answer",
    "influence",
    "memory_needed",
    "statistics_of_shape",
]
