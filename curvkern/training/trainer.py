"""Guards as callbacks of transformers.Trainer, with their state in its checkpoints. Transformers is not imported."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainerCallback as Events
else:

    class Events:
        """A callback is what answers to the names of events: so nobody waits five seconds for transformers."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("on_"):
                return _nothing
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nothing(*_: Any, **__: Any) -> None:
    """What becomes of an event that a guard does not look at."""


#: Options of TrainingArguments with which weights or gradients are not whole where a callback sees them.
SHARDS = {"fsdp": "it keeps weights in shards", "deepspeed": "it keeps weights and gradients to itself"}
#: The option with which a callback's own gradients would need the loss scale.
SCALES = {"fp16": "it scales the loss, and a callback's gradients have no part in that; train in bf16"}


def refuse(who: str, args: Any, breaks: dict[str, str], instead: str = "") -> None:
    """Raise ValueError if `TrainingArguments` have an option that breaks a callback: option -> why; says which."""
    for option, why in breaks.items():
        if getattr(args, option, None):
            given = f"{option}={getattr(args, option)!r}"
            raise ValueError(f"{who}: does not work with the Trainer's {given}: {why}.{instead}")


class Guard(Events, ABC):
    """A callback that writes its state into every checkpoint of the Trainer, and reads it when training resumes.

    Attributes:
        file: its name in the checkpoint's folder.
        breaks: option of `TrainingArguments` -> why the guard cannot work with it.
        resume_from: folder of the checkpoint that training resumes from, where it is not in ``output_dir``; False to
            begin anew on resuming.
    """

    file: ClassVar[str]
    breaks: ClassVar[dict[str, str]] = SHARDS
    resume_from: str | os.PathLike[str] | bool | None = None

    @abstractmethod
    def attach(self, model: nn.Module) -> object:
        """Get hold of the model, before training."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs: tensors, numbers, text, and dictionaries and lists of them."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches to the model; loads the state where training resumes.

        Raises:
            ValueError: an option of the Trainer breaks the guard (says which), or the state is another step's.
            FileNotFoundError: training resumes, but the checkpoint has no state of the guard.
        """
        who = type(self).__name__
        refuse(who, args, self.breaks)
        if getattr(state, "is_hyper_param_search", False):
            raise ValueError(f"{who}: does not work in a hyper-parameter search: all trials would share its state.")
        self.attach(kwargs["model"])
        if state.global_step and self.resume_from is not False:
            self._resume(args, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the state beside the model."""
        if state.is_world_process_zero:
            saved = {"global_step": state.global_step, "state": self.state_dict()}
            torch.save(saved, _checkpoint(args, state.global_step) / self.file)

    def _resume(self, args: Any, step: int) -> None:
        who = type(self).__name__
        places = [self.resume_from, args.resume_from_checkpoint, _checkpoint(args, step)]
        files = [Path(place) / self.file for place in places if isinstance(place, (str, os.PathLike))]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            looked = ", ".join(map(str, files))
            raise FileNotFoundError(
                f"{who}: training resumes at step {step}, but there is no {looked}. Set the guard's resume_from to the "
                "folder of the checkpoint, or to False to begin anew."
            )
        saved = torch.load(found, map_location="cpu", weights_only=True)
        if saved["global_step"] != step:
            raise ValueError(f"{who}: {found} is of step {saved['global_step']}, but training resumes at step {step}.")
        self.load_state_dict(saved["state"])


def _checkpoint(args: Any, step: int) -> Path:
    """Where the Trainer puts the checkpoint of a step."""
    return Path(args.output_dir) / f"checkpoint-{step}"
