r"""WeightEMA: the average of the weights that training went through, which forgets less than the last ones."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from curvkern.backend import check
from curvkern.ops import lerp_list_
from curvkern.training.averaged import Product, Weight, on_host, products, wide
from curvkern.training.trainer import SHARDS, Guard
from curvkern.training.wrappers import trained

Lora = Literal["factors", "product"]
Place = Literal["device", "host"]


class WeightEMA(Guard):
    r"""Exponential moving average of the trained parameters, in float32.

    .. math:: m_t = \eta_t m_{t-1} + (1 - \eta_t)\,\theta_t, \quad m_0 = \theta_0, \quad
        \eta_t = \min\left(\eta, \frac{1 + t}{w + t}\right)

    m starts at the aligned model and is what to evaluate and keep; training never sees it. With :math:`d_t` the t-th
    step and constant :math:`\eta`, :math:`m_T - \theta_0 = \sum_t (1 - \eta^{T-t+1})\,d_t`: late steps count less. To
    put m back into the model after every step would only make the learning rate :math:`1 - \eta` times as large.

    In a loop of one's own::

        ema = WeightEMA(0.995).attach(model)
        ...                                     # after every optimizer.step(): ema.update()
        with ema.swapped():
            evaluate(model)

    or ``Trainer(..., callbacks=[WeightEMA(0.995)])``: evaluations see the average, checkpoints hold the weights of
    training with the average beside them (``weight_ema.pt``), and after training the model is the average.

    Args:
        decay: eta, in [0, 1).
        every: look at the weights at every k-th step only, with the decay of k steps together. The average is then up
            to k - 1 steps late.
        warmup: w; 0 and 1 give a constant decay, 10 is customary. It makes the average forget the start, that is the
            aligned model, sooner.
        lora: ``"factors"`` averages A and B each for themselves, which is not the average of what they do.
            ``"product"`` averages BA, [out, in] in float32 for every adapted module, and swaps in the nearest pair of
            A's rank (by a full SVD; `products` has the average itself).
        place: of the average: ``"device"``, beside each parameter; ``"host"``, in CPU memory, by a pinned copy of the
            parameters: slower by the bus, so look seldom (``every``).

    Raises:
        ValueError: decay outside [0, 1), every below 1, warmup below 0, an unknown word.

    Source: Kim et al., Rethinking Safety in LLM Fine-tuning (2508.12531); the decay is not theirs, who do not say it.
    """

    file: ClassVar[str] = "weight_ema.pt"
    breaks: ClassVar[dict[str, str]] = {
        **SHARDS,
        "load_best_model_at_end": "the best checkpoint holds weights of training, not their average",
    }

    def __init__(
        self, decay: float, *, every: int = 1, warmup: float = 0, lora: Lora = "factors", place: Place = "device"
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"WeightEMA: decay is {decay}; wanted at least 0, below 1. 0.995 is a start.")
        if not 0 <= warmup < math.inf:
            raise ValueError(f"WeightEMA: warmup is {warmup}; wanted at least 0.")
        check.at_least("WeightEMA", "every", every, 1)
        check.one_of("WeightEMA", "lora", lora, get_args(Lora))
        check.one_of("WeightEMA", "place", place, get_args(Place))
        self.decay, self.every, self.warmup, self.lora, self.place = decay, every, warmup, lora, place
        self.step = 0
        self._kept = 1.0  # product of the decays since the average last moved
        self._slots: list[Weight | Product] = []
        self._shadow: list[Tensor] = []
        self._staged: list[Tensor] = []
        self._live: list[Tensor] | None = None
        self._lent = False  # swapped in by an event of the Trainer

    def attach(self, model: nn.Module) -> WeightEMA:
        """Begin with the model's present weights.

        Args:
            model: its parameters that require a gradient are averaged, shared ones once; it may be compiled, wrapped
                by DistributedDataParallel or PEFT.

        Returns:
            Itself.

        Raises:
            ValueError: nothing is trained, or there is no LoRA layer where ``lora="product"``.
        """
        parameters = trained("WeightEMA", model)
        self._slots = products(parameters) if self.lora == "product" else []
        paired = {id(p) for slot in self._slots for p in slot.parameters}
        self._slots += [Weight(name, p) for name, p in parameters.items() if id(p) not in paired]
        self._staged = [on_host(p) for slot in self._slots for p in slot.parameters] if self.place == "host" else []
        self._shadow = [value.to(wide(value), copy=True) for value in self._values()]
        self.step, self._kept, self._live, self._lent = 0, 1.0, None, False
        return self

    def update(self) -> None:
        """Take in the weights; to be called once after every step of the optimiser.

        Raises:
            RuntimeError: it is not attached, or the average is swapped in.
        """
        self._check_live("update")
        self.step += 1
        self._kept *= min(self.decay, (1 + self.step) / (self.warmup + self.step))
        if self.step % self.every == 0:
            lerp_list_(self._shadow, self._values(), 1 - self._kept)
            self._kept = 1.0

    @contextmanager
    def swapped(self) -> Generator[None]:
        """Inside, the model's weights are the average; after, they are what they were, to the bit.

        Needs a copy of the parameters meanwhile.

        Raises:
            RuntimeError: it is not attached, or the average is swapped in already.
        """
        self._swap_in()
        try:
            yield
        finally:
            self._swap_out()

    def copy_to_model(self) -> None:
        """Make the average the model's weights for good.

        Raises:
            RuntimeError: it is not attached, or the average is swapped in.
        """
        self._check_live("copy_to_model")
        with torch.no_grad():
            for slot, shadow in zip(self._slots, self._shadow, strict=True):
                slot.put(shadow)

    def averages(self) -> dict[str, Tensor]:
        """Name of a parameter -> its average, float32; those of factors that are averaged as a product are left out."""
        slots = zip(self._slots, self._shadow, strict=True)
        return {slot.name: shadow for slot, shadow in slots if isinstance(slot, Weight)}

    def products(self) -> dict[str, Tensor]:
        """Name of a LoRA module and adapter -> the average of BA, float32 [out, in], without the LoRA scale."""
        slots = zip(self._slots, self._shadow, strict=True)
        return {slot.name: shadow for slot, shadow in slots if isinstance(slot, Product)}

    def state_dict(self) -> dict[str, Any]:
        """The average and where it stands; not a copy."""
        names = [slot.name for slot in self._slots]
        return {"step": self.step, "kept": self._kept, "shadow": dict(zip(names, self._shadow, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; decay and the like are this object's own.

        Raises:
            ValueError: it is of another model: names or shapes differ.
        """
        shapes = {slot.name: list(m.shape) for slot, m in zip(self._slots, self._shadow, strict=True)}
        given = {name: list(m.shape) for name, m in state["shadow"].items()}
        for name in sorted(shapes.keys() | given.keys()):
            if shapes.get(name) != given.get(name):
                raise ValueError(
                    f"WeightEMA: the state has {given.get(name, 'nothing')} for {name}, the model "
                    f"{shapes.get(name, 'nothing')}; load the state of this model, trained on the same parameters."
                )
        for slot, m in zip(self._slots, self._shadow, strict=True):
            m.copy_(state["shadow"][slot.name])
        self.step, self._kept = state["step"], state["kept"]

    # as a callback ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `Guard`."""
        super().on_train_begin(args, state, control, **kwargs)
        self._before_saving = kwargs["model"].register_state_dict_pre_hook(self._take_back)
        if args.eval_on_start:
            self._lend()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training goes on with its own weights."""
        self._take_back()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes in the weights; an evaluation that comes now sees the average."""
        self.update()
        if control.should_evaluate:
            self._lend()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation that comes now sees the average."""
        if control.should_evaluate:
            self._lend()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the average in the model."""
        self._take_back()
        self._before_saving.remove()
        self.copy_to_model()

    def _lend(self) -> None:
        """Swap in until the next step begins or the model is saved: evaluations of several data sets have no end."""
        if not self._lent:
            self._swap_in()
            self._lent = True

    def _take_back(self, *_: object) -> None:
        if self._lent:
            self._swap_out()
            self._lent = False

    # within -----------------------------------------------------------------------------------------------------------

    def _values(self) -> list[Tensor]:
        """The present weights or products, where the average is."""
        parameters = [p for slot in self._slots for p in slot.parameters]
        if self._staged:
            for staged, p in zip(self._staged, parameters, strict=True):
                staged.copy_(p.detach(), non_blocking=True)
            for device in {p.device for p in parameters if p.is_cuda}:
                torch.cuda.synchronize(device)
        held = iter(self._staged or [p.detach() for p in parameters])
        return [slot.value(*(next(held) for _ in slot.parameters)) for slot in self._slots]

    def _swap_in(self) -> None:
        self._check_live("swapped")
        self._live = [p.detach().to(m.device, copy=True) for p, m in self._held()]
        with torch.no_grad():
            for slot, shadow in zip(self._slots, self._shadow, strict=True):
                slot.put(shadow)

    def _swap_out(self) -> None:
        with torch.no_grad():
            for (p, _), old in zip(self._held(), self._live or (), strict=True):
                p.copy_(old)
        self._live = None

    def _held(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, m) for slot, m in zip(self._slots, self._shadow, strict=True) for p in slot.parameters]

    def _check_live(self, what: str) -> None:
        if not self._slots:
            raise RuntimeError(f"WeightEMA: {what} before attach; call attach(model) where training begins.")
        if self._live is not None:
            raise RuntimeError(f"WeightEMA: {what} while the average is swapped in; leave `with ema.swapped()` first.")
