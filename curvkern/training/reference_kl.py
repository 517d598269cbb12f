"""ReferenceKL: how far the model's answers are from those of the aligned model."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from curvkern.ops import kl_to_reference
from curvkern.training.batches import Batch

UNLABELLED = -100


class ReferenceKL:
    r"""The loss :math:`KL(P_{\theta_0} \| P_\theta)`, mean over response tokens: those with a label.

    Args:
        reference: the aligned model, put in eval mode; on the model's device. None: the model itself without its
            adapters (PEFT's ``disable_adapter``), which is the aligned model only if they sit right on it.

    Source: SafeGrad (2508.07172), eq. 6; its code sums over prompt and padding too, so that the value hangs on padding.
    """

    def __init__(self, reference: nn.Module | None = None) -> None:
        self.reference = None if reference is None else reference.eval()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch.

        Args:
            model: differentiable in its parameters.
            batch: ``input_ids``, ``labels`` [n, t] with -100 where no response is, and what else the models take, on
                the model's device.

        Raises:
            ValueError: no token has a label, the vocabularies differ, or there is neither reference nor adapter.
        """
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        counted = batch["labels"][:, 1:] != UNLABELLED
        if not counted.any():
            raise ValueError("ReferenceKL: no token of the batch has a label; wanted responses, with labels.")
        with torch.no_grad(), self._aligned(model) as aligned:
            wanted = aligned(**inputs).logits[:, :-1][counted]
        got = model(**inputs).logits[:, :-1][counted]
        if wanted.shape != got.shape:
            raise ValueError(
                f"ReferenceKL: the reference knows {wanted.shape[-1]} words, the model {got.shape[-1]}; wanted the "
                "aligned model it is tuned from, with as many embeddings."
            )
        return kl_to_reference(got, wanted)

    @contextlib.contextmanager
    def _aligned(self, model: Any) -> Any:
        if self.reference is not None:
            yield self.reference
        elif hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield model
        else:
            raise ValueError(
                f"ReferenceKL: reference is None, but {type(model).__name__} has no adapters to turn off; pass the "
                "aligned model."
            )
