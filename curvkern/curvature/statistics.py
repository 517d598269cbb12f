"""Statistics of weights: raw sums and what they were summed over, in a file that others can read.

A file is safetensors. Tensors are named ``<quantity>/<parameter>``; the metadata entry ``curvkern`` is JSON: the
choices (`Choices`), the counts (`Counts`), the parameters that were not measured, and under ``shared`` the tensors that
stand in the file under another name only (modules with the same inputs share a Gram). Sums are float32 and not
normalised: files of parts of the data add up.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from curvkern.curvature.hidden import CurvatureError
from curvkern.curvature.kept import Kept

#: Quantities that grow with the number of samples, or of tokens, and the power of the loss that they grow with.
PER_SAMPLE = {
    "gradient": 1, "abs_gradient": 1, "hessian_diag": 1, "hessian_trace": 1,
    "fisher_diag": 2, "gauss_newton_diag": 2, "fisher_blocks": 2, "ekfac": 2,
}  # fmt: skip
PER_TOKEN = {"input_gram": 0, "output_gram": 2}
#: One row a sample: of parts of the data they stand one after the other.
ROWS = ("sample_norms", "low_rank")


@dataclass(frozen=True)
class Choices:
    """What was asked for; statistics that differ in any of these do not add up.

    Attributes:
        model: fingerprint of the model's parameters.
        sample: ``"sequence"``, ``"token"`` or ``"batch"``.
        fisher_type: ``"empirical"``, ``"mc"`` or ``"type-2"``.
        loss: ``"response_mean"``, ``"token_mean"``, ``"token_sum"`` or the name of a callable.
        block: sides of the tiles of ``fisher_blocks``, or their name.
        mc_samples: label draws per sample, for ``"mc"``.
        probes: random directions, for ``hessian_diag``.
        seed: of draws and probes.
        dtype: of the model.
    """

    model: str
    sample: str = "sequence"
    fisher_type: str = "empirical"
    loss: str = "response_mean"
    block: tuple[int, int] | str = (128, 128)
    mc_samples: int = 1
    probes: int = 8
    seed: int = 0
    dtype: str = "float32"


@dataclass
class Counts:
    """What was summed over.

    Attributes:
        rows: sequences that were looked at, those of no finite loss too.
        samples: sequences, times the draws of their labels.
        tokens: tokens that are no padding.
        targets: tokens that carried loss.
        data: fingerprints of the data, one for each part.
        loss: the sum of the losses; NaN where it is not known: in old files, before a sweep has ended.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    data: tuple[str, ...] = ()
    loss: float = field(default=0.0, compare=False)  # the order of its sum is that of the batches

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows + other.rows,
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.targets + other.targets,
            self.data + other.data,
            self.loss + other.loss,
        )


@dataclass
class Statistics:
    """Sums by quantity and parameter.

    Attributes:
        sums: quantity -> parameter -> float32 tensor, in memory or read when it is asked for.
        choices: see `Choices`.
        counts: see `Counts`.
        unmeasured: parameters of the model that no statistic covers.
    """

    choices: Choices
    counts: Counts = field(default_factory=Counts)
    sums: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])
    unmeasured: tuple[str, ...] = ()

    def __getitem__(self, quantity: str) -> Mapping[str, Tensor]:
        """The raw sums of a quantity, by parameter."""
        if quantity not in self.sums:
            raise CurvatureError(f"statistics: there is no {quantity!r}; there is {', '.join(self.sums) or 'nothing'}")
        return self.sums[quantity]

    def mean(self, quantity: str) -> dict[str, Tensor]:
        """The sums over the number of samples; of Gram matrices, over the number of tokens.

        The sums of ``loss="token_mean"`` are of a sample's summed loss; here it is divided by the mean number of
        targets of a sample, so that the mean loss is that of a token.
        """
        count = self._count(quantity)
        return {name: tensor / count for name, tensor in self[quantity].items()}

    def mean_of(self, quantity: str, name: str) -> Tensor:
        """`mean`, of one parameter."""
        return self[quantity][name] / self._count(quantity)

    @property
    def mean_loss(self) -> float:
        """Of a sample; under ``loss="token_mean"``, of a token."""
        return self.counts.loss / (self.counts.targets if self.choices.loss == "token_mean" else self.counts.samples)

    def _count(self, quantity: str) -> float:
        """What a sum is to be divided by."""
        power = {**PER_SAMPLE, **PER_TOKEN}.get(quantity)
        if power is None:
            raise CurvatureError(f"statistics: {quantity!r} is no sum over data, so it has no mean")
        count: float = self.counts.tokens if quantity in PER_TOKEN else self.counts.samples
        if self.choices.loss == "token_mean":
            count *= (self.counts.targets / self.counts.samples) ** power
        return count

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of the data of both.

        Raises:
            CurvatureError: they were made of different models, with different choices, or of the same data.
        """
        mine, theirs = asdict(self.choices), asdict(other.choices)
        for name, value in mine.items():
            if theirs[name] != value:
                raise CurvatureError(f"statistics: {name} is {value!r} in one and {theirs[name]!r} in the other")
        again = set(self.counts.data) & set(other.counts.data)
        if again:
            raise CurvatureError(f"statistics: both were made of the data {', '.join(sorted(again))}")
        if self.choices.sample == "batch":
            raise CurvatureError("statistics: squares of a whole batch's gradient do not add up (sample='batch')")
        if {q: set(s) for q, s in self.sums.items()} != {q: set(s) for q, s in other.sums.items()}:
            raise CurvatureError("statistics: they do not hold the same quantities of the same parameters")
        if "ekfac" in self.sums:
            raise CurvatureError("statistics: EK-FAC of two parts of the data is in two bases; estimate both at once")
        joined: dict[tuple[int, int], Tensor] = {}  # what both share stays shared
        sums: dict[str, dict[str, Tensor]] = {}
        for quantity, of in self.sums.items():
            sums[quantity] = {}
            for name, one in of.items():
                two = other.sums[quantity][name]
                key = one.data_ptr(), two.data_ptr()
                if key not in joined or not one.numel():
                    joined[key] = _joined(quantity, one, two)
                sums[quantity][name] = joined[key]
        return replace(self, counts=self.counts + other.counts, sums=sums)

    def trace_error(self) -> dict[str, tuple[float, float]]:
        """(trace of the mean Hessian, its standard error over the probes), by parameter."""
        found: dict[str, tuple[float, float]] = {}
        for name, traces in self.mean("hessian_trace").items():
            found[name] = (traces.mean().item(), (traces.std() / len(traces) ** 0.5).item())
        return found

    def about(self) -> dict[str, Any]:
        """All but the sums, for the file's metadata."""
        return {"choices": asdict(self.choices), "counts": asdict(self.counts), "unmeasured": self.unmeasured}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; what was there is replaced when the new file is whole.

        Raises:
            CurvatureError: it cannot be written, as on a full disk; what was there stays.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        every = {f"{q}/{name}": t for q, of in self.sums.items() for name, t in of.items()}
        first = {t.data_ptr(): key for key, t in reversed(every.items()) if t.numel()}
        shared = {key: first[t.data_ptr()] for key, t in every.items() if first.get(t.data_ptr(), key) != key}
        tensors = {key: t.contiguous().cpu() for key, t in every.items() if key not in shared}
        meta = {**self.about(), "shared": shared}
        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part, metadata={"curvkern": json.dumps(meta)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise CurvatureError(f"{path}: statistics cannot be written: {error}; make room, and run again") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote, all of it.

        Raises:
            CurvatureError: the file is no such file.
        """
        there = cls.open(path)
        return replace(there, sums={quantity: cast("Kept", of).read() for quantity, of in there.sums.items()})

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """What `save` wrote, of which each tensor is read when it is asked for, to the CPU.

        Raises:
            CurvatureError: the file is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {}).get("curvkern", "null"))
                keys = list(file.keys())
        except SafetensorError as error:
            raise CurvatureError(f"{path}: not a safetensors file ({error})") from None
        if meta is None:
            raise CurvatureError(f"{path}: holds no statistics of curvkern (no 'curvkern' in its metadata)")
        there = {key: key for key in keys} | meta.get("shared", {})
        sums: dict[str, dict[str, str]] = {}
        for key, stands in there.items():
            quantity, _, name = key.partition("/")
            sums.setdefault(quantity, {})[name] = stands
        kept = {quantity: Kept(Path(path), of) for quantity, of in sums.items()}
        return cls(_choices(meta["choices"]), _counts(meta["counts"]), kept, tuple(meta["unmeasured"]))


def _joined(quantity: str, one: Tensor, other: Tensor) -> Tensor:
    return torch.cat([one, other]) if quantity in ROWS else one + other


def _choices(found: Mapping[str, Any]) -> Choices:
    block = found["block"]
    values: dict[str, Any] = {**found, "block": block if isinstance(block, str) else tuple(block)}
    return Choices(**values)


def _counts(found: Mapping[str, Any]) -> Counts:
    values: dict[str, Any] = {"loss": math.nan, **found, "data": tuple(found["data"])}
    return Counts(**values)


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """crc32 over names, shapes and a strided sample of each parameter's bytes: the same model, told in milliseconds."""
    return joined_fingerprint({name: parameter_crc(tensor) for name, tensor in parameters})


def parameter_crc(tensor: Tensor) -> int:
    """crc32 of a parameter's shape, dtype and some of its bytes."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // 4096)][:4097].contiguous().cpu()
    crc = zlib.crc32(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    return zlib.crc32(some.view(torch.uint8).numpy().tobytes(), crc)


def joined_fingerprint(crcs: Mapping[str, int]) -> str:
    """Of a model, from its parameters' in any order."""
    return f"{zlib.crc32(repr(sorted(crcs.items())).encode()):08x}"
