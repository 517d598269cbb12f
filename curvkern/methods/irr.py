"""IRR: identify the unsafe part of an update, remove it, and let the rest make up for it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Method, MethodError, Module, Need
from curvkern.ops import block_select, inverse_factor, obs_sweep_

SAFETY_FISHER = Need("fisher_diag", "safety", at="aligned")
TASK_GRAM = Need("input_gram", "task")
BLOCK = 128


class IRR(Method):
    r"""Identify, remove, recalibrate (Wu et al., ACL 2025 Findings, 2412.11041).

    With :math:`\Delta = W_t - W_a` and the safety vector :math:`V = W_a - W_u` (u: the unaligned model): in every
    block of 128 columns the entries whose signs of Delta and V differ (zero is a sign of its own) are ranked by their
    safety Fisher; all but the ``spared`` share of lowest Fisher are set to 0. What is left makes up for it on the
    task's inputs by an OBS sweep with their Gram. Inputs that are always 0 lose their Delta.

    ``mode="parity"`` tests signs on what the sweep has made of Delta by then, as the published code does;
    ``"corrected"`` on Delta itself, as the paper says, which lets columns with many removed entries go first.
    Ablations: ``recalibrate=False``; ``signs=False`` ranks all entries. Other than there, the Fisher is of sequences,
    not of batches of 8, the Gram is of the tuned model, not of layers edited so far, and padding does not count.
    """

    name: ClassVar[str] = "irr"
    source: ClassVar[str] = "Wu et al. 2412.11041, section 3"
    needs: ClassVar[frozenset[str]] = frozenset({"unaligned", "safety", "task"})
    oriented: ClassVar[bool] = True
    workspace: ClassVar[int] = 9

    spared: float = Field(0.0, ge=0, le=1, description="share of a block's conflicting entries that are kept")
    recalibrate: bool = Field(True, description="let the rest make up for what is removed")
    signs: bool = Field(True, description="only entries that conflict with the safety vector may be removed")
    mode: Literal["parity", "corrected"] = "parity"
    damping: float = Field(0.01, gt=0, description="of the Gram; share of its mean diagonal")

    def statistics(self) -> tuple[Need, ...]:
        """The safety Fisher at the aligned model, the Gram of task inputs at the tuned one."""
        return SAFETY_FISHER, TASK_GRAM

    def edit(self, module: Module, plan: Any) -> Edit:
        """Remove and recalibrate in one module."""
        if module.unaligned is None:
            raise MethodError("irr: needs the unaligned model; pass unaligned=...")
        gram = module.statistics[TASK_GRAM]
        delta = module.tuned.float() - module.aligned.float()
        delta[:, gram.diagonal() == 0] = 0
        vector = module.aligned.float() - module.unaligned.float()
        unsafe = self._unsafe(delta, vector, module.statistics[SAFETY_FISHER])
        notes = {"unsafe": float(unsafe.float().mean())}
        if not self.recalibrate:
            return Edit(module.aligned.float() + delta.masked_fill_(unsafe, 0), notes=notes)
        factor, _ = inverse_factor(gram, damping=self.damping)
        if self.mode == "corrected":
            obs_sweep_(delta, unsafe, factor, order="fixed_first")
        else:
            fisher = module.statistics[SAFETY_FISHER]
            obs_sweep_(
                delta, lambda at, values: self._unsafe(values, vector[:, at], fisher[:, at]), factor, block=BLOCK
            )
        return Edit(module.aligned.float() + delta, notes=notes)

    def _unsafe(self, delta: Tensor, vector: Tensor, fisher: Tensor) -> Tensor:
        """What is to be removed, block of columns by block of columns; bool like delta."""
        return block_select(
            delta.contiguous(), torch.zeros_like(delta), rule="grad", gate="conflict" if self.signs else "none",
            grad=fisher, direction=vector, spare=self.spared, block=(None, BLOCK),
        )  # fmt: skip
