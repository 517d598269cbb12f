"""Merges of the tuned model with the aligned one: the simplest baselines."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Method, Module, given
from curvkern.ops import blend_, dare, model_stock, slerp, ties


class Merge(Method):
    r"""Model merging (Farn et al., 2412.19512), tensor by tensor, float32 inside, one rounding.

    With the update :math:`\Delta = W_t - W_a` and w = ``weight``, the share of the aligned model:

    - ``linear``: :math:`W_a + (1 - w) \Delta`. An adapter stays one: its B shrinks by 1 - w.
    - ``slerp``: from W_t to W_a along the arc, w of the way; linear where their cosine is above 0.9995, as it is for
      nearly every fine-tuned tensor (Shoemake 1985; mergekit's limit).
    - ``ties``: :math:`W_a + (1 - w)` times the ``density`` n entries of :math:`\Delta` that are largest in magnitude
      (Yadav et al., 2306.01708). One update has no signs to elect, so only the trimming acts. Not in Farn et al.
    - ``dare``: :math:`W_a + (1 - w) c\, m \odot \Delta`, m one with probability ``density`` (Yu et al., 2311.03099);
      ``rescale`` chooses c, see `curvkern.ops.dare`.
    - ``model_stock``: W_a and W_t averaged and pulled towards their common origin, the base model W_u, by the angle
      between their updates (Jang et al., 2403.19522); w plays no part. Farn et al. average several runs of fine-tuning
      towards W_a; here there is one.
    """

    name: ClassVar[str] = "merge"
    source: ClassVar[str] = "Farn et al. 2412.19512; ties: Yadav et al. 2306.01708"

    kind: Literal["linear", "slerp", "ties", "dare", "model_stock"] = "linear"
    weight: float = Field(0.5, ge=0, le=1, description="share of the aligned model")
    density: float = Field(0.5, gt=0, le=1, description="share of the update that ties and dare keep")
    rescale: Literal["inverse", "l1", "none"] = Field("inverse", description="of what dare keeps")
    seed: int = Field(0, ge=0, description="of dare's draw")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base model, for ``model_stock``."""
        return frozenset({"base"}) if self.kind == "model_stock" else frozenset()

    def edits_adapter(self) -> bool:
        """Only ``linear`` keeps the update's factors."""
        return self.kind == "linear"

    def edit(self, module: Module, plan: Any) -> Edit:
        """Merge one module; with ``linear`` an adapter's B is scaled by 1 - w."""
        weight = self._merged(module)
        selected = "all" if self.weight > 0 else 0
        if module.factors is None or not self.edits_adapter():
            return Edit(weight, selected=selected)
        b, a, _ = module.factors
        return Edit(weight, factors=((b.float() * (1 - self.weight)).to(b.dtype), a), selected=selected)

    def _merged(self, module: Module) -> Tensor:
        """In the models' dtype, if it is the same: the ops are float32 inside and round once."""
        aligned, tuned = module.aligned, module.tuned
        if aligned.dtype != tuned.dtype:
            aligned, tuned = aligned.float(), tuned.float()
        if self.kind == "linear":
            return blend_(tuned.clone(), aligned, self.weight)
        if self.kind == "slerp":
            return slerp(tuned, aligned, self.weight)
        if self.kind == "ties":
            return ties(aligned, [tuned], self.density, scale=1 - self.weight)
        if self.kind == "dare":
            seed = module.own_seed(self.seed)
            return dare(aligned, tuned, 1 - self.density, seed, self.rescale, weight=1 - self.weight)
        return model_stock(given(self, module.base, "base").to(aligned.dtype), [aligned, tuned])
