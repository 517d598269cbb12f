"""curvkern gives a fine-tuned language model its safety back: curvature, alignment subspaces, rollback."""

__version__ = "0.1.0"

try:
    from curvkern.backend.dispatch import BackendError as BackendError
    from curvkern.backend.dispatch import Choice as Choice
    from curvkern.backend.dispatch import explain as explain
    from curvkern.backend.dispatch import use as use
    from curvkern.ops import *  # noqa: F403
    from curvkern.restore import restore as restore
except Exception as error:  # no torch, or a broken one: `curvkern env` must still be able to say so
    _broken = error

    def __getattr__(name: str) -> object:
        raise ImportError(
            f"curvkern.{name}: curvkern cannot work here: {_broken}. `python -m curvkern env` says what is missing."
        ) from _broken
