"""curvkern gives a fine-tuned language model its safety back: curvature, alignment subspaces, rollback."""

from curvkern.backend.dispatch import BackendError as BackendError
from curvkern.backend.dispatch import Choice as Choice
from curvkern.backend.dispatch import explain as explain
from curvkern.backend.dispatch import use as use
from curvkern.ops import *  # noqa: F403

__version__ = "0.1.0"
