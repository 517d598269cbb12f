"""The taps of curvature see in single layers what they see in the model in memory."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from layerwise.tiny import resident, save
from oracles import close, texts
from torch.nn.functional import cross_entropy

from curvkern.curvature import estimate
from curvkern.curvature.capture import linear_sites, tapped
from curvkern.curvature.experts import expert_sites, experts_tapped
from curvkern.curvature.sums import Sums
from curvkern.curvature.texts import batches
from curvkern.layerwise import LayerwiseModel


def token_sum(logits, labels):
    return cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none").sum(1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("quantity", ["fisher_diag", "kfac"])
def test_sums_are_those_of_the_model_in_memory(tmp_path, kind, quantity):
    path, rows = save(tmp_path / "model", kind), texts()
    wanted = estimate(resident(path), rows, quantity=quantity, loss=token_sum, batch_tokens=13)
    sums, current = Sums([quantity], "sequence", (128, 128), len(rows)), []

    @contextmanager
    def watch(place):
        if place.index is None:
            yield lambda batch: None
            return
        linear, experts = (
            [
                replace(site, name=f"{place.name}.{site.name}", bias=site.bias and f"{place.name}.{site.bias}")
                for site in found
            ]
            for found in (linear_sites(place.module), expert_sites(place.module))
        )
        uses, mask = {site.name: 1 for site in linear}, lambda: current[-1].mask
        with tapped(linear, uses, sums.add, mask), experts_tapped(model.model, experts, sums.add, mask):
            yield current.append

    def losses(model, batch):
        return token_sum(model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits, batch.labels)

    with LayerwiseModel.open(path) as model:
        model.backward(list(batches(rows, 13, "cpu")), losses, watch=watch)
    for name, of in wanted.sums.items():
        assert of.keys() == sums.found[name].keys()
        for parameter, tensor in of.items():
            if kind in ("llama", "gpt2"):
                assert torch.equal(sums.found[name][parameter], tensor)
            else:  # the forward sweep, which has no taps, runs experts by other kernels
                close(sums.found[name][parameter], tensor.double())
