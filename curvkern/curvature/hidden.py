"""Gradients of the hidden-state cosine loss: how far a prompt's representation has moved from an anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

Data = Literal["harmful", "task"]


class CurvatureError(RuntimeError):
    """A statistic cannot be had from this model or these data."""


class _Stop(Exception):
    """The layer of interest has been computed."""


class HiddenEvidence:
    r"""A causal LM in memory, whose loss is the cosine distance of hidden states from two anchors.

    The loss of a minibatch is :math:`-\cos(\bar h, a)`: :math:`\bar h` the batch mean of the last token's hidden state
    after ``layer_fraction`` of the decoder layers, a the mean of the same over all prompts of that set, taken once:
    for "harmful" from the aligned model, for "task" from the tuned one. Gradients of minibatches are summed.
    Source: Yang et al. 2504.09757, section IV.

    Attributes:
        weights: checkpoint name -> live parameter of the layers that the loss reaches, linear modules only.
        layer_parameters: parameters of all decoder layers.
        model: at the working weights.
    """

    def __init__(
        self,
        aligned: Path,
        tuned: Iterable[tuple[str, Tensor]],
        *,
        prompts: Mapping[Data, Sequence[list[int]]],
        score: Callable[[Any], float],
        layer_fraction: float,
        batch_size: int,
        dtype: torch.dtype | Literal["auto"] = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load the aligned model, take its anchor, then put the tuned weights in.

        Args:
            aligned: checkpoint directory.
            tuned: (checkpoint name, tensor) of every tensor that both models have.
            prompts: "harmful" and "task": token ids, unpadded.
            score: of the model at the working weights; higher is better.
            layer_fraction: in (0, 1]; layers up to this share of the depth are run.
            batch_size: prompts in a minibatch.
            dtype: of the working weights and the model's arithmetic; ``"auto"``: the checkpoint's.
            device: where the model runs.

        Raises:
            CurvatureError: the model's parameters do not carry the checkpoint's names, it has no decoder stack, or a
                hidden state is not finite.
        """
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(aligned, dtype=dtype)
        self.model = model.to(device).eval()
        self._score = score
        self._batches = {data: list(_batches(rows, batch_size)) for data, rows in prompts.items()}

        stack = _decoder_layers(self.model)
        depth = max(1, int(len(stack) * layer_fraction + 1e-9))
        self._last = stack[depth - 1]
        self.layer_parameters = sum(p.numel() for p in stack.parameters())
        reached = {id(p) for layer in list(stack)[:depth] for p in _linear_parameters(layer)}
        named = dict(self.model.named_parameters())
        self._parameters = {name: p for name, p in named.items() if id(p) in reached}
        self.weights: Mapping[str, Tensor] = {name: p.detach() for name, p in self._parameters.items()}
        for name, parameter in named.items():
            parameter.requires_grad_(name in self._parameters)

        self._anchors = {"harmful": self._anchor("harmful")}
        self._load(tuned)
        self._anchors["task"] = self._anchor("task")
        self._sums: dict[str, Tensor] = {}
        self.clear_gradients()

    def add_gradient(self, data: Data) -> Mapping[str, Tensor]:
        """Add the gradient of the data's loss at the working weights to the sums.

        Returns:
            The sums, float32, by checkpoint name. They are kept: call `clear_gradients` to start again.

        Raises:
            CurvatureError: a loss or a gradient is not finite.
        """
        for at, batch in enumerate(self._batches[data]):
            mean = self._hidden(batch).float().mean(0)
            loss = -cosine_similarity(mean, self._anchors[data], dim=0)
            if not loss.isfinite():
                raise CurvatureError(f"the hidden-state loss of {data} minibatch {at + 1} is {loss.item()}")
            loss.backward()
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self._sums[name] += parameter.grad
                    parameter.grad = None
        bad = [name for name, total in self._sums.items() if not total.isfinite().all()]
        if bad:
            raise CurvatureError(f"the gradient of the {data} loss by {bad[0]} is not finite ({len(bad)} in all)")
        return self._sums

    def clear_gradients(self) -> None:
        """Set the sums to zero."""
        self._sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.weights.items()}

    def score(self) -> float:
        """The task score of the working weights."""
        return self._score(self.model)

    @torch.no_grad()
    def _anchor(self, data: Data) -> Tensor:
        total = sum(self._hidden(batch).float().sum(0) for batch in self._batches[data])
        anchor = torch.as_tensor(total) / sum(len(batch["input_ids"]) for batch in self._batches[data])
        if not anchor.isfinite().all():
            which = "aligned" if data == "harmful" else "tuned"
            raise CurvatureError(
                f"the {which} model's hidden states on the {data} prompts are not finite; look for NaN or infinity in "
                "its weights"
            )
        return anchor

    def _hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[n, hidden]: the last token's state after the last layer of interest; later layers do not run."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)
            raise _Stop

        handle = self._last.register_forward_hook(catch)
        try:
            self.model(**{k: v.to(self.model.device) for k, v in batch.items()}, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return caught[0][:, -1]

    @torch.no_grad()
    def _load(self, tuned: Iterable[tuple[str, Tensor]]) -> None:
        state = self.model.state_dict()
        for name, tensor in tuned:
            if name not in state:
                raise CurvatureError(
                    f"the checkpoint's {name} is no parameter of {type(self.model).__name__}: this transformers holds "
                    "it in another form. Such models cannot be restored by a method that needs the model in memory."
                )
            state[name].copy_(tensor)


def _batches(prompts: Sequence[list[int]], size: int) -> Iterator[dict[str, Tensor]]:
    """Minibatches padded on the left, so that the last column is every prompt's last token."""
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        yield {"input_ids": ids, "attention_mask": mask}


def _decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers: the ModuleList with as many children as the configuration has layers."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise CurvatureError(f"{type(model).__name__} has no list of {wanted} decoder layers")


def is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D: a linear module that keeps its weight [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _linear_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    for module in layer.modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield from module.parameters()
