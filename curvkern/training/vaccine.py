r"""Vaccine: align under the perturbation of hidden embeddings that hurts most."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvkern.ops import norm_list
from curvkern.training.matching import matching


class Vaccine:
    r"""Two passes a step: find the perturbation of the chosen modules' outputs, then train under it.

    .. math:: \epsilon_l = \rho\,\frac{\nabla_{e_l} L}{|(\nabla_{e_1} L, \ldots, \nabla_{e_L} L)|}

    For the alignment stage, in a loop of one's own; once a micro-batch::

        vaccine = Vaccine(model)
        loss = vaccine.backward(lambda: model(**batch).loss)    # instead of loss.backward()

    The Trainer gives callbacks no batch: there, call it in an overridden ``training_step``.

    Args:
        model: not wrapped by DistributedDataParallel.
        modules: patterns of their full names; each gives a tensor, or a tuple that begins with one.
        rho: length of all perturbations together.

    Attributes:
        skipped: micro-batches trained without perturbation, as its gradient was not finite.

    Raises:
        TypeError, ValueError: rho not above 0, a pattern that matches no module (says what is near).

    Source: Huang et al., Vaccine (2402.01109), its algorithm. Two forward and backward passes.
    Dropout, if any, differs between them.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] = ("*.self_attn",), *, rho: float = 2.0) -> None:
        if not 0 < rho < math.inf:
            raise ValueError(f"Vaccine: rho is {rho}; wanted above 0.")
        self.rho, self.skipped = rho, 0
        self._modules = matching("Vaccine", "module", model.named_modules(), modules)

    def backward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Add the gradient of the perturbed loss to ``.grad`` of what is trained.

        Args:
            loss: computes it for one batch; is called twice.

        Returns:
            The perturbed loss, without graph.

        Raises:
            RuntimeError: the loss does not pass through the modules.
        """
        perturbations = self._perturbations(loss)
        with self._hooked(lambda name, output: output + perturbations[name].to(output.dtype)):
            perturbed = loss()
            perturbed.backward()  # within: recomputed activations (gradient checkpointing) need the hooks too
        return perturbed.detach()

    def _perturbations(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}

        def record(name: str, output: Tensor) -> Tensor:
            outputs.setdefault(name, output)  # the first: gradient checkpointing computes it again
            return output

        with self._hooked(record):
            value = loss()
            missing = [name for name in self._modules if name not in outputs]
            if missing:
                raise RuntimeError(
                    f"Vaccine: the loss does not pass through {missing[0]}; choose modules it depends on. Of a "
                    "compiled model that ran before, the graphs do not see them: torch._dynamo.reset()."
                )
            found = torch.autograd.grad(value, list(outputs.values()))
        norm = float(norm_list(found))
        if not math.isfinite(norm):
            self.skipped += 1
            warnings.warn(
                f"Vaccine: a gradient of embeddings is not finite; no perturbation ({self.skipped} times so far).",
                RuntimeWarning,
                stacklevel=3,
            )
        scale = self.rho / norm if 0 < norm < math.inf else 0.0
        pairs = zip(outputs, found, strict=True)
        return {name: gradient * scale if scale else torch.zeros_like(gradient) for name, gradient in pairs}

    @contextmanager
    def _hooked(self, edit: Callable[[str, Tensor], Tensor]) -> Generator[None]:
        """Inside, ``edit`` gives what the modules' (first) outputs become."""

        def hook(name: str) -> Callable[..., Any]:
            def run(module: nn.Module, inputs: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return edit(name, output[0]), *output[1:]
                return edit(name, output)

            return run

        handles = [module.register_forward_hook(hook(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
