"""Layer by layer, every gradient is bit for bit what autograd finds in the whole model."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from layerwise.tiny import KINDS, Recorder, loss, make_batches, resident, resident_gradients, save

from curvkern.checkpoint import Checkpoint, open_tuned
from curvkern.layerwise import LayerwiseModel


def layerwise_gradients(model, batches, **options):
    recorder, hidden = Recorder(), {}

    @contextmanager
    def watch(place):
        handles = recorder.hooks(
            place.module if place.index is not None else model.model.lm_head, place.name or "lm_head"
        )
        yield lambda batch: None
        for handle in handles:
            handle.remove()

    def on_hidden(layer, at, gradient):
        hidden[layer, at] = gradient.clone()

    report = model.backward(batches, loss, watch=watch, on_hidden=on_hidden, **options)
    return recorder.pairs, hidden, report


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for key, tensors in wanted.items():
        tensors, others = (x if isinstance(x, list) else [x] for x in (tensors, got[key]))
        assert len(tensors) == len(others)
        for one, other in zip(tensors, others, strict=True):
            assert torch.equal(one, other), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_whole_model(tmp_path, kind, dtype):
    path, batches = save(tmp_path / "model", kind, dtype), make_batches()
    whole = resident(path)
    pairs, hidden = resident_gradients(whole, batches)
    with LayerwiseModel.open(path) as model:
        found, passed, report = layerwise_gradients(model, batches)
        assert {n: (p.shape, p.dtype) for n, p in model.model.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in whole.named_parameters()
        }
    assert_same(passed, hidden)
    assert_same(found, pairs)
    assert len(pairs) > 3 * 3
    for at, batch in enumerate(batches):
        assert torch.equal(report.losses[at], loss(whole, batch))


def test_every_layer_is_read_once_a_direction(tmp_path, monkeypatch):
    """The last one but once: it stays for its way back."""
    path, read = save(tmp_path / "model", "llama", num_hidden_layers=5), Counter()
    plain = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *a: (read.update([name]), plain(self, name, *a))[1])
    with LayerwiseModel.open(path) as model:
        report = model.backward(make_batches(), loss)
    assert report.reads == (2, 2, 2, 2, 1)
    times = {name: int(name.split(".")[2]) for name in read if ".layers." in name}
    assert {name: read[name] for name in times} == {name: report.reads[layer] for name, layer in times.items()}
    assert all(read[name] == 1 for name in read.keys() - times.keys())
    with Checkpoint.open(path) as checkpoint:
        assert report.bytes_read == sum(checkpoint.spec(name).nbytes * read[name] for name in times)
    assert report.loading > 0
    assert 0 <= report.waiting <= report.loading + 0.1
    assert report.computing > 0


@pytest.mark.parametrize("keep_every, reads", [(2, (3, 2, 3, 2, 1)), (3, (3, 3, 2, 2, 1)), (5, (2, 2, 2, 2, 1))])
@pytest.mark.parametrize("spilled", [False, True])
def test_boundaries_on_disk_or_made_again_change_nothing(tmp_path, keep_every, reads, spilled):
    path, batches = save(tmp_path / "model", "gemma2", torch.bfloat16, num_hidden_layers=5), make_batches()
    spill = tmp_path / "spill"
    spill.mkdir()
    with LayerwiseModel.open(path) as model:
        pairs, hidden, _ = layerwise_gradients(model, batches)
        again, passed, report = layerwise_gradients(
            model, batches, keep_every=keep_every, spill=spill if spilled else None
        )
    assert_same(passed, hidden)
    assert_same(again, pairs)
    assert report.reads == reads
    assert not list(spill.iterdir())


def test_files_are_used_and_gone_after_a_failure(tmp_path):
    path, spill = save(tmp_path / "model", "llama"), tmp_path / "spill"
    spill.mkdir()
    seen = []

    def fail(layer, at, gradient):
        seen.append(len(list(spill.glob("*/*"))))
        if layer == 2:
            raise KeyboardInterrupt

    with LayerwiseModel.open(path) as model:
        with pytest.raises(KeyboardInterrupt):
            model.backward(make_batches(), loss, spill=spill, on_hidden=fail)
        assert seen[0] > 9
        assert not list(spill.iterdir())
        assert all(p.is_meta for layer in model.layers for p in layer.parameters())
        assert all("forward" not in vars(layer) for layer in model.layers)
        model.backward(make_batches(), loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_out(tmp_path, side):
    """Gradients at tokens are those of the rows alone, without padding."""
    path, batches = save(tmp_path / "model", "qwen3"), make_batches(side, count=1)
    (batch,) = batches
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    total = batch["attention_mask"].sum() - len(batch["labels"])
    rows = [{k: v[r : r + 1, m.bool()] for k, v in batch.items()} for r, m in enumerate(batch["attention_mask"])]

    def summed(model, batch):
        labels = batch["labels"]
        return loss(model, batch) * ((labels[:, 1:] != -100).sum() / total)

    padded, alone = {}, {}
    with LayerwiseModel.open(path) as model:
        model.backward(batches, summed, on_hidden=lambda layer, at, g: padded.update({layer: g.clone()}))
        model.backward(rows, summed, on_hidden=lambda layer, at, g: alone.update({(layer, at): g.clone()}))
    for (layer, row), gradient in alone.items():
        kept = batch["attention_mask"][row].bool()
        torch.testing.assert_close(padded[layer][row, kept], gradient[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_what_lies_outside_the_layers_is_as_transformers_loads_it(tmp_path, tied):
    path = save(tmp_path / "model", "gemma3", tie_word_embeddings=tied)
    whole = resident(path)
    with LayerwiseModel.open(path) as model:
        assert (model.model.lm_head.weight is model.model.model.embed_tokens.weight) == tied
        for name, tensor in whole.state_dict().items():
            mine = model.model.state_dict()[name]
            assert mine.is_meta if ".layers." in name else torch.equal(mine, tensor)
        buffers = dict(whole.named_buffers())
        assert buffers
        for name, mine in model.model.named_buffers():
            assert torch.equal(mine, buffers[name])
            assert mine.dtype == buffers[name].dtype


def test_a_weight_that_is_to_have_a_gradient_gets_it(tmp_path):
    path, batches, found = save(tmp_path / "model", "mixtral"), make_batches(), {}

    @contextmanager
    def watch(place):
        if place.index is not None:
            place.module.requires_grad_(True)
        yield lambda batch: None
        if place.index is not None:
            found.update({f"{place.name}.{n}": p.grad for n, p in place.module.named_parameters()})

    with LayerwiseModel.open(path) as model:
        model.backward(batches, loss, watch=watch)
    whole = resident(path).requires_grad_(True)
    for batch in batches:
        loss(whole, batch).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if ".layers." in name}
    assert_same(found, wanted)


def test_adapters_and_other_dtypes(tmp_path):
    """What is opened already may be anything that reads like a checkpoint; weights are cast as they come."""
    peft = pytest.importorskip("peft")
    path, batches = save(tmp_path / "model", "llama"), make_batches()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(resident(path), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().double()
    hidden = resident_gradients(merged, batches)[1]
    with Checkpoint.open(path) as aligned, open_tuned(tmp_path / "adapter", aligned) as tuned:
        with LayerwiseModel.open(tuned, dtype=torch.float64) as model:
            passed = layerwise_gradients(model, batches)[1]
        for key, gradient in hidden.items():
            assert passed[key].dtype == torch.float64
            torch.testing.assert_close(passed[key], gradient, rtol=1e-5, atol=1e-8)
        tuned.read("model.norm.weight")  # still open
