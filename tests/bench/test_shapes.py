"""A pass over made-up weights: what runs, what is edited, what its rows say of layers that did not run."""

import json

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from curvkern.bench import shapes
from curvkern.bench.machine import Machine
from curvkern.bench.run import run
from curvkern.bench.shapes import LLAMAS, MadeUp, measure_shape
from curvkern.layerwise import LayerwiseModel

MACHINE = Machine("Chip (R) CPU @ 2 GHz", "cpu", "2 cores", "torch 0", "abc", 1 << 16, 1e10, 1e11, 2e11)
TINY = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2)  # fmt: skip


def rows(layers):
    (found,) = measure_shape(MACHINE, "llama-tiny", layers)
    return {row.provider: row for row in found}


def test_what_did_not_run_is_extrapolated_and_says_so():
    found = rows(2)
    assert list(found) == ["a layer", "its loading, beside it", "head and loss", "2 layers", "all 3, extrapolated"]
    layer, head, ran, whole = (found[name] for name in ("a layer", "head and loss", "2 layers", "all 3, extrapolated"))
    assert "llama-tiny, 2 of 3 layers" in layer.shape
    assert ran.median == pytest.approx(head.median + 2 * layer.median)
    assert whole.median == pytest.approx(head.median + 3 * layer.median)
    assert (ran.bytes, whole.flops) == (2 * layer.bytes, 3 * layer.flops)
    assert layer.extra > 0


def test_all_layers_are_measured_and_not_extrapolated():
    assert list(rows(None))[-1] == "3 layers"


def test_work_of_a_layer_is_counted_from_its_linear_weights():
    hidden, inner, _, heads, pairs, _ = LLAMAS["llama-tiny"]
    linear = 2 * hidden * hidden * (1 + pairs / heads) + 3 * hidden * inner
    layer = rows(1)["a layer"]
    assert layer.flops == 8 * linear * 4 * 64
    assert layer.bytes == 4 * 2 * linear + 6 * 2 * hidden * 4 * 64


def test_every_layer_is_edited():
    visits, report, seconds = shapes._visited(TINY, shapes._batches("cpu", 64), "cpu")
    assert len(visits.layers) == len(visits.peaks) == 2
    assert 0.1 < visits.chosen / (visits.edited // 2) < 0.9  # about half: where the loss falls
    assert visits.head + sum(visits.layers) < seconds
    assert min(report.reads) >= 1
    assert all(bool(loss.isfinite()) for loss in report.losses)


def test_made_up_weights_are_a_checkpoint_that_stays_the_same(tmp_path):
    source, other = MadeUp(tmp_path, TINY, 0), MadeUp(tmp_path, TINY, 1)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name), source.read(name))
    assert not torch.equal(source.read(name), other.read(name))
    assert 0.015 < float(source.read(name).float().std()) < 0.025
    assert float(source.read("model.norm.weight").mean()) == pytest.approx(1, abs=0.02)
    assert source.spec(name).nbytes == source.read(name).nbytes
    with LayerwiseModel.open(source) as model:
        assert len(model.layers) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shape": "llama-9"}, "no shape 'llama-9'; there are llama-tiny, .*llama-3-70b"),
        ({"shape": "llama-3-70b", "layers": 81}, "layers is 81; llama-3-70b has 80, wanted 1 to 80"),
        ({"shape": "llama-3-8b", "layers": 0}, "layers is 0"),
    ],
)
def test_wrong_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        next(measure_shape(MACHINE, **{"layers": None, **options}))


def test_the_command_prints_it_and_leaves_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr("curvkern.bench.run.examine", lambda device: MACHINE)
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    assert run(passes=True, shape="llama-tiny", layers=2, trace=tmp_path / "t.json", device="cpu", console=console) == 0
    text = console.export_text()
    assert "llama-tiny, 2 of 3 layers" in text
    assert "all 3, extrapolated" in text
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {"statistics", "compute", "read"} <= {event.get("cat") for event in events}
    with pytest.raises(ValueError, match=r"shape, layers and trace are of a pass; add --pass"):
        run(shape="llama-tiny")
