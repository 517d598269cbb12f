"""A causal language model run one decoder layer at a time, from its checkpoint: forward, backward, tangent.

with LayerwiseModel.open("model") as model:
    report = model.backward(batches, lambda model, batch: model(**batch).loss, watch=watch)
"""

from curvkern.layerwise.error import LayerwiseError
from curvkern.layerwise.gradient import Place
from curvkern.layerwise.model import LayerwiseModel, Report

__all__ = ["LayerwiseError", "LayerwiseModel", "Place", "Report"]
