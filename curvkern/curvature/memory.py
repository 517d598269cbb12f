"""How much memory an estimate will take, told before it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkern.curvature.capture import Kind, Site, select, sites_of
from curvkern.curvature.estimate import FisherType, LossName
from curvkern.curvature.experts import expert_sites
from curvkern.curvature.losses import Loss, total_loss
from curvkern.curvature.resident import measured
from curvkern.curvature.sums import Block, tile
from curvkern.curvature.texts import Batch, Text, batches, checked, from_rows


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        statistics: what is returned, and what is held beside it until then.
        activations: what a forward of the largest batch keeps for its backward.
        model: parameters and buffers, which are there already.
    """

    statistics: int
    activations: int
    model: int

    @property
    def extra(self) -> int:
        """What an estimate adds to the model."""
        return self.statistics + self.activations


def memory_needed(
    model: Any,
    data: Iterable[Any],
    *,
    quantity: str | Sequence[str] = "fisher_diag",
    fisher_type: FisherType = "empirical",
    loss: LossName | Loss = "response_mean",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[Kind] = ("linear", "experts"),
    block: Block = (128, 128),
    batch_tokens: int = 4096,
    max_length: int | None = None,
    probes: int = 8,
) -> Memory:
    """The memory that `estimate` of the same arguments will take; runs one forward of the longest sample.

    Statistics are exact. Activations are those of that sample, times the samples of the largest batch; a Hessian keeps
    those of the first backward too, about twice as much.

    Raises:
        CurvatureError: as `estimate`.
    """
    wanted = (quantity,) if isinstance(quantity, str) else tuple(quantity)
    texts = checked(from_rows(data), max_length)
    linear, experts = select([*sites_of(model), *expert_sites(model)], include, exclude, kinds)
    sites = [*linear, *experts]
    longest = max(texts, key=lambda text: len(text.ids))
    with measured(model, include, exclude, kinds, longest, lambda site, pair: None) as started:
        inputs, kept = _of_one(model, next(batches([longest], 1, model.device)), sites, loss, started)
    statistics = sum(_stored(site, wanted, len(texts), block, probes) for site in sites)
    if {"input_gram", "kfac", "ekfac"} & set(wanted):
        copies = 2 if "ekfac" in wanted else 1  # the eigenvectors
        statistics += 4 * copies * sum(inputs)
    together = max(batch.ids.numel() for batch in batches(texts, batch_tokens, "meta")) / len(longest.ids)
    if fisher_type == "type-2":
        together = model.config.get_text_config().vocab_size
    twice = 3 if "hessian_diag" in wanted else 1
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return Memory(statistics, int(kept * together * twice), own)


def _stored(site: Site, wanted: Sequence[str], samples: int, block: Block, probes: int) -> int:
    """Bytes of a weight's statistics, but for the Grams of inputs."""
    *experts, rows, cols = site.shape if len(site.shape) > 1 else (*site.shape, 1)
    out = cols if site.transposed else rows
    each = math.prod(site.shape)
    height, width = tile(block, rows, cols)
    tiles = math.prod(experts) * -(-rows // height) * -(-cols // width)
    grams = math.prod(experts) * out**2
    bytes_of = {
        "fisher_blocks": 4 * tiles,
        "sample_norms": 4 * samples,
        "low_rank": 2 * samples * each,
        "input_gram": 0,
        "kfac": 4 * grams,
        "ekfac": 4 * (each + 2 * grams),
        "hessian_diag": 4 * (2 * each + probes),  # the gradient, for all probes
    }
    return sum(bytes_of.get(quantity, 4 * each) for quantity in wanted)


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model and estimates of it take, told from shapes alone; activations roughly, the rest at most.

    Attributes:
        model: all weights.
        outside: of these, what lies outside of decoder layers: embeddings, final norm, head.
        layer: the weights of the largest decoder layer.
        statistics: what is estimated, of all modules.
        layer_statistics: of these, what has to be in memory when they go to files layer by layer, one set after the
            other: a layer's; of EK-FAC, which looks at the data twice, and of a Hessian all.
        activations: what a forward of the largest batch keeps for its backward.
        layer_activations: of these, what the largest layer or the head keeps.
        hidden: hidden states between layers, of all batches.
    """

    model: int
    outside: int
    layer: int
    statistics: int
    layer_statistics: int
    activations: int
    layer_activations: int
    hidden: int

    @property
    def resident(self) -> int:
        """With all of it in memory."""
        return self.model + self.statistics + self.activations

    @property
    def by_layer(self) -> int:
        """With one layer in memory and the next one on its way, hidden states and statistics in files."""
        return self.outside + 2 * self.layer + self.layer_statistics + self.layer_activations


def footprint(
    layers: Mapping[int | None, Shapes],
    itemsize: int,
    sets: Sequence[tuple[Sequence[Text], Sequence[str]]],
    measured: Container[str],
    batch_tokens: int = 4096,
) -> Footprint:
    """What it will take to estimate the statistics of a model; nothing is run or read.

    Args:
        layers: shapes of a checkpoint's tensors, by decoder layer; None: outside of them.
        itemsize: bytes of a weight and of an activation.
        sets: samples, and the quantities that are estimated on them, see `estimate`.
        measured: names of the weights that statistics are estimated of.
        batch_tokens: as for `estimate`.
    """
    weights = {at: itemsize * sum(map(math.prod, shapes.values())) for at, shapes in layers.items()}
    inside = {at: {n: s for n, s in of.items() if len(s) > 1} for at, of in layers.items() if at is not None}
    statistics = [
        [
            sum(statistics_of_shape(s, wanted, len(texts)) for n, s in of.items() if n in measured)
            for of in inside.values()
        ]
        for texts, wanted in sets
    ]
    at_once = [
        sum(of) if {"ekfac", "hessian_diag"} & set(wanted) else max(of)
        for of, (_, wanted) in zip(statistics, sets, strict=True)
    ]
    table = max((shape for shape in layers.get(None, {}).values() if len(shape) == 2), key=math.prod, default=(0, 0))
    widths = [[batch.ids.numel() for batch in batches(texts, batch_tokens, "meta")] for texts, _ in sets]
    widest = max(max(of) for of in widths)
    kept = [widest * itemsize * sum(sum(shape[-2:]) for shape in shapes.values()) for shapes in inside.values()]
    head = widest * table[0] * (itemsize + 3 * 4)  # logits, and in float32 their gradient and two steps between
    return Footprint(
        model=sum(weights.values()),
        outside=weights.get(None, 0),
        layer=max(weights[at] for at in inside),
        statistics=sum(map(sum, statistics)),
        layer_statistics=max(at_once),
        activations=sum(kept) + head,
        layer_activations=max(*kept, head),
        hidden=max(map(sum, widths)) * table[1] * itemsize * (len(inside) + 2),
    )


def statistics_of_shape(shape: tuple[int, ...], wanted: Sequence[str], samples: int) -> int:
    """Bytes of a weight's statistics, as if it shared its inputs with no other."""
    inputs = math.prod(shape[:-2]) * shape[-1] ** 2
    site = Site("", shape, False, None, (), "experts" if len(shape) > 2 else "linear")
    copies = max(({"input_gram": 1, "kfac": 1, "ekfac": 2}.get(quantity, 0) for quantity in wanted), default=0)
    return _stored(site, wanted, samples, (128, 128), 8) + 4 * copies * inputs


def _of_one(
    model: Any, batch: Batch, sites: Sequence[Site], loss: str | Loss, started: Callable[[Batch], None]
) -> tuple[list[int], float]:
    """Elements of the Grams of inputs, one for modules that share them; bytes that a forward keeps."""
    grams: dict[Any, int] = {}
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def look(site: Site) -> Any:
        def before(module: Any, arguments: tuple[Any, ...]) -> None:
            grams[arguments[0].data_ptr()] = arguments[0].shape[-1] ** 2

        def experts(module: Any, arguments: tuple[Any, ...]) -> None:
            grams[site.name] = site.shape[0] * site.shape[1 if site.transposed else 2] ** 2

        return experts if site.kind == "experts" else before

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    gathered = [site for site in sites if site.kind in ("linear", "experts")]
    handles = [module.register_forward_pre_hook(look(site)) for site in gathered for module in site.modules]
    started(batch)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = total_loss(model, batch, loss)
    finally:
        for handle in handles:
            handle.remove()
    del total
    return list(grams.values()), sum(seen.values())
