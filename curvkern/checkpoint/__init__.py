"""Checkpoints and LoRA adapters: read tensor by tensor, written whole or not at all.

with Checkpoint.open("aligned") as aligned, open_tuned("tuned-or-adapter", aligned) as tuned:
    bundle = Bundle({"aligned": aligned, "tuned": tuned})
    with Writer("restored", like=tuned, inputs=bundle.sources) as writer:
        for name, tensors in bundle:
            writer.write(name, torch.lerp(tensors["tuned"], tensors["aligned"], 0.5))
        writer.copy_rest()
        writer.finish()
"""

from curvkern.checkpoint.adapter import Adapter, LoraFactors
from curvkern.checkpoint.bundle import Bundle
from curvkern.checkpoint.card import as_json, plain
from curvkern.checkpoint.delta import Delta, apply_delta, undo_delta
from curvkern.checkpoint.error import CheckpointError
from curvkern.checkpoint.fingerprint import fingerprint, require_recorded
from curvkern.checkpoint.format import TensorSpec
from curvkern.checkpoint.read import Checkpoint
from curvkern.checkpoint.tuned import EditedView, TunedView, Weights, open_tuned
from curvkern.checkpoint.write import Writer
from curvkern.checkpoint.write_adapter import AdapterWriter
from curvkern.checkpoint.write_delta import DeltaWriter

__all__ = [
    "Adapter",
    "AdapterWriter",
    "Bundle",
    "Checkpoint",
    "CheckpointError",
    "Delta",
    "DeltaWriter",
    "EditedView",
    "LoraFactors",
    "TensorSpec",
    "TunedView",
    "Weights",
    "Writer",
    "apply_delta",
    "as_json",
    "fingerprint",
    "open_tuned",
    "plain",
    "require_recorded",
    "undo_delta",
]
