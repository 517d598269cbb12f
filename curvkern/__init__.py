"""curvkern gives a fine-tuned language model its safety back: curvature, alignment subspaces, rollback."""

from curvkern.backend.dispatch import BackendError, Choice, explain, use
from curvkern.ops import *  # noqa: F403

__version__ = "0.1.0"
