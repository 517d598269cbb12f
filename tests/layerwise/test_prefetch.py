"""Weights on their way to the device: on a stream of their own, from pinned memory; the CPU knows nothing of it."""

import pytest
import torch
from layerwise.tiny import loss, make_batches, save

from curvkern.checkpoint import Checkpoint
from curvkern.layerwise import LayerwiseModel


def losses_and_gradients(path, device):
    hidden = {}
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in make_batches()]
    with LayerwiseModel.open(path, device) as model:
        report = model.backward(
            batches, loss, on_hidden=lambda layer, at, g: hidden.__setitem__((layer, at), g.cpu().clone())
        )
        return report, hidden, model._loader


def test_on_a_cpu_there_is_no_stream_and_nothing_is_pinned(tmp_path, monkeypatch):
    def pinned(*arguments, **options):
        raise AssertionError("a stream on a CPU")

    path = save(tmp_path / "model", "llama")
    monkeypatch.setattr(torch.cuda, "Stream", pinned)
    report, _, loader = losses_and_gradients(path, "cpu")
    assert loader._stream is None
    assert report.bytes_read > 0


@pytest.mark.gpu
def test_weights_come_on_a_stream_of_their_own(tmp_path, monkeypatch):
    path, streams, pinned = save(tmp_path / "model", "llama"), [], []
    plain = Checkpoint.read

    def read(self, name, device="cpu"):
        tensor = plain(self, name, device)
        streams.append(torch.cuda.current_stream())
        return tensor

    shard_read = "curvkern.checkpoint.shard.SafetensorsShard.read"
    from curvkern.checkpoint.shard import SafetensorsShard

    into = SafetensorsShard.read

    def kept(self, spec, **options):
        pinned.append(options.get("pinned"))
        return into(self, spec, **options)

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(shard_read, kept)
    _, _, loader = losses_and_gradients(path, "cuda")
    assert loader._stream is not None
    assert set(streams) == {loader._stream}
    assert loader._stream != torch.cuda.current_stream()
    assert set(pinned) == {True}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_slow_layer_does_not_see_weights_that_are_not_there_yet(tmp_path, kind):
    """The same as on a CPU, run after run, while other work keeps the caller's stream busy."""
    path = save(tmp_path / "model", kind)
    _, wanted, _ = losses_and_gradients(path, "cpu")
    for _ in range(5):
        torch.cuda._sleep(20_000_000)
        _, found, _ = losses_and_gradients(path, "cuda")
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)
