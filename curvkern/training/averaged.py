"""What a moving average is taken of: a parameter, or the product of a LoRA pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """A parameter, averaged as it is."""

    name: str
    parameter: nn.Parameter

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is read and written."""
        return (self.parameter,)

    def value(self, parameter: Tensor) -> Tensor:
        """What is averaged, of the parameter or a copy of it."""
        return parameter

    def put(self, average: Tensor) -> None:
        """Make the average the parameter."""
        self.parameter.copy_(average)


@dataclass(frozen=True)
class Product:
    """A LoRA pair, averaged as BA."""

    name: str
    a: nn.Parameter
    b: nn.Parameter

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is read and written."""
        return self.a, self.b

    def value(self, a: Tensor, b: Tensor) -> Tensor:
        """BA, of the factors or copies of them."""
        dtype = wide(a)
        return b.to(dtype) @ a.to(dtype)

    def put(self, average: Tensor) -> None:
        """The pair of its rank whose product is nearest (Eckart and Young), both factors alike in norm."""
        rank = len(self.a)
        u, s, v = torch.linalg.svd(average, full_matrices=False)
        root = torch.zeros(rank, dtype=s.dtype, device=s.device)
        root[: len(s)] = s[:rank].sqrt()
        self.b.zero_()[:, : len(s)] = (u[:, :rank] * root[: len(s)]).to(self.b)
        self.a.zero_()[: len(s)] = (root[: len(s), None] * v[:rank]).to(self.a)


def products(parameters: dict[str, nn.Parameter]) -> list[Weight | Product]:
    """The LoRA pairs among parameters.

    Raises:
        ValueError: there are none.
    """
    found: list[Weight | Product] = []
    for name, a in parameters.items():
        b = parameters.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and b is not None and a.ndim == b.ndim == 2:
            found.append(Product(name.replace(".lora_A.", ".").removesuffix(".weight"), a, b))
    if not found:
        raise ValueError("WeightEMA: lora is 'product', but no pair of trained lora_A and lora_B matrices was found.")
    return found


def wide(tensor: Tensor) -> torch.dtype:
    """Float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def on_host(parameter: Tensor) -> Tensor:
    """Room for a copy of a parameter in CPU memory, pinned if it comes from a GPU."""
    return torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda, requires_grad=False)
