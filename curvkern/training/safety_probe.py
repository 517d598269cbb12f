r"""SafetyProbe: vectors in the hidden states that make a harmful step look bad for the task (SAP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from curvkern.ops import ball_perturb_, norm_list
from curvkern.training.batches import Batch
from curvkern.training.matching import matching
from curvkern.training.wrappers import trained

PUBLISHED = ("*.layers.3.mlp.down_proj", "*.layers.9.mlp.down_proj")


class SafetyProbe:
    r"""Safety-aware probing. The output of each chosen module gains a vector, v of them all; :math:`\theta` is trained.

    .. math::
        g = \nabla_\theta L_{contrast}(\theta, v), \quad
        \theta' = \theta + r\,|\theta|\,\frac{g}{|g| + 10^{-8}}, \quad
        g_v = \nabla_v \left(L_{task}(\theta, v) - L_{task}(\theta', v)\right)

    :math:`\theta` steps by :math:`\nabla_\theta L_{task}(\theta, v)`; v becomes one Adam step from zero along
    :math:`g_v`, whose moments persist, and is in force at the next step. :math:`L_{contrast}` grows as harmful answers
    become likelier than safe ones, so that :math:`\theta'` is more harmful. :math:`\theta` comes back from there to the
    bit.

    In a loop of one's own::

        probe = SafetyProbe(model)
        ...                                             # for each micro-batch, instead of loss.backward()
        probe.backward(lambda: model(**batch).loss, lambda: contrast_loss(model, safe, harmful))
        ...                                             # after optimizer.step()
        probe.step()
        with probe.off():                               # evaluate and save without it
            evaluate(model)

    The Trainer gives callbacks no batch: there, call `backward` in an overridden ``training_step``. Three forward and
    backward passes; a copy of the trained parameters and two gradients of them: made for adapters. One process.

    Args:
        model: its parameters that require a gradient are theta; not wrapped.
        modules: patterns of full names of linear layers. The vectors are no parameters of the model: its checkpoints do
            not hold them, and a bias of a module stays.
        rate: r.
        lr: of v.

    Attributes:
        vectors: name of a module -> v, float32 [out_features].

    Raises:
        TypeError, ValueError: rate or lr not above 0, a pattern that matches no module (says what is near), a module
            without ``out_features``, nothing that is trained.

    Source: Wu et al., SAP (2505.16737); layers, rate and lr of its code, whose contrast loss is not shifted by a token.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[str] = PUBLISHED, *, rate: float = 2e-5, lr: float = 0.05
    ) -> None:
        for name, value in {"rate": rate, "lr": lr}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"SafetyProbe: {name} is {value}; wanted above 0.")
        self._theta = list(trained("SafetyProbe", model).values())
        chosen = matching("SafetyProbe", "module", model.named_modules(), modules)
        self.rate = rate
        self.vectors = {name: _vector(name, module) for name, module in chosen.items()}
        self._optimiser = torch.optim.Adam(self.vectors.values(), lr=lr)
        self._saved: tuple[Tensor, ...] | None = None
        self._on = True
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in chosen.items()]

    def backward(self, task: Callable[[], Tensor], contrast: Callable[[], Tensor]) -> Tensor:
        """Add the task's gradient to ``.grad`` of what is trained, and g_v to the vectors'.

        Args:
            task: computes the task's loss of one batch; is called twice.
            contrast: computes what grows with harm, such as `contrast_loss`.

        Returns:
            The task's loss, without graph.

        Raises:
            RuntimeError: the task's loss does not pass through the modules.
        """
        vectors = list(self.vectors.values())
        direction = torch.autograd.grad(contrast(), self._theta, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            radius = self.rate * norm_list(self._theta)
            undo = ball_perturb_(self._theta, direction, radius, eps=1e-8, saved=self._saved)
        self._saved = undo.saved
        try:
            harmed: Any = torch.autograd.grad(task(), vectors, allow_unused=True)
        finally:
            undo.restore_()
        for name, gradient in zip(self.vectors, harmed, strict=True):
            if gradient is None:
                raise RuntimeError(
                    f"SafetyProbe: the task's loss does not pass through {name}; choose modules it depends on. Of a "
                    "compiled model that ran before, the graphs do not see the vectors: torch._dynamo.reset()."
                )
        loss = task()
        loss.backward()
        with torch.no_grad():
            for vector, gradient in zip(vectors, harmed, strict=True):
                if vector.grad is not None:
                    vector.grad -= gradient
        return loss.detach()

    def step(self) -> None:
        """Move the vectors, after the optimiser's step."""
        with torch.no_grad():
            for vector in self.vectors.values():
                vector.zero_()
        self._optimiser.step()
        self._optimiser.zero_grad()

    @contextmanager
    def off(self) -> Generator[None]:
        """Inside, the model is without the vectors."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def remove(self) -> None:
        """Take the vectors out of the model for good."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The vectors and their optimiser."""
        vectors = {name: vector.detach() for name, vector in self.vectors.items()}
        return {"vectors": vectors, "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it has other modules.
        """
        if state["vectors"].keys() != self.vectors.keys():
            wanted, given = (", ".join(names) for names in (self.vectors, state["vectors"]))
            raise ValueError(f"SafetyProbe: the state is of {given}; wanted {wanted}.")
        with torch.no_grad():
            for name, vector in self.vectors.items():
                vector.copy_(state["vectors"][name])
        self._optimiser.load_state_dict(state["optimiser"])

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def run(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + self.vectors[name].to(output.dtype) if self._on else output

        return run


def contrast_loss(model: nn.Module, safe: Batch, harmful: Batch, *, temperature: float = 1.0) -> Tensor:
    r"""Mean of :math:`-\log\sigma((\log p(safe) - \log p(harmful)) / \tau)` over pairs of answers to one prompt.

    Args:
        model: differentiable.
        safe: ``input_ids`` and ``labels`` [n, t] with -100 where no answer is, and what else the model takes.
        harmful: the same prompts with harmful answers; its t may be another.
        temperature: tau.

    Returns:
        Scalar. Log probabilities are sums over an answer's tokens, in float32.

    Source: SAP's code, without its errors: answers are read by the model, and labels are shifted by a token.
    """
    gap = _log_prob(model, safe) - _log_prob(model, harmful)
    return -logsigmoid(gap / temperature).mean()


def _log_prob(model: nn.Module, batch: Batch) -> Tensor:
    """Of each row's labels, [n]."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -cross_entropy(logits.mT.to(wide), batch["labels"][:, 1:], reduction="none").sum(1)


def _vector(name: str, module: Any) -> Tensor:
    size = getattr(module, "out_features", None)
    if not isinstance(size, int):
        raise ValueError(f"SafetyProbe: {name} is {type(module).__name__}, without out_features; choose linear layers.")
    device = next(module.parameters()).device
    return torch.zeros(size, dtype=torch.float32, device=device, requires_grad=True)
