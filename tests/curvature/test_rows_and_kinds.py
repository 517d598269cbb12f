"""How data may be given, which weights and tiles may be asked for, and what it will take."""

import pytest
import torch
from oracles import close, make, sample_gradients, texts

from curvkern.curvature import KINDS, CurvatureError, Statistics, Text, estimate, memory_needed


def as_row(text, before=0, after=0):
    ids, labels, ones = list(text.ids), list(text.labels), [1] * len(text.ids)
    pads = {"input_ids": 5, "labels": 7, "attention_mask": 0}
    given = {"input_ids": ids, "labels": labels, "attention_mask": ones}
    return {key: [pads[key]] * before + values + [pads[key]] * after for key, values in given.items()}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_padded_and_packed_rows_are_their_samples(kind):
    model, rows = make(kind), texts()
    quantities = ("fisher_diag", "kfac", "sample_norms")
    alone = estimate(model, rows, quantity=quantities)
    left = [as_row(text, before=n) for n, text in enumerate(rows)]
    right = [as_row(text, after=2) for text in rows]
    packed = {
        "input_ids": [at for text in rows for at in text.ids],
        "labels": [at for text in rows for at in text.labels],
        "position_ids": [n for text in rows for n in range(len(text.ids))],
    }
    for given in (left, right, [packed], [*left[:2], as_row(rows[2]), rows[3]]):
        found = estimate(model, given, quantity=quantities)
        assert found.counts == alone.counts
        for quantity, of in alone.sums.items():
            assert all(torch.equal(found[quantity][name], tensor) for name, tensor in of.items())


def test_a_sample_of_one_token_of_loss_and_rows_of_broken_lengths():
    model = make("llama")
    one = Text((5, 6, 7), (-100, -100, 7))
    found = estimate(model, [one])
    exact = sample_gradients(model, [one])
    for name, tensor in found["fisher_diag"].items():
        close(tensor, exact[name].square().sum(0))
    with pytest.raises(CurvatureError, match="3 input_ids but 2 attention_mask"):
        estimate(model, [{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}])


def test_the_mean_over_tokens_is_that_of_a_loss_over_all_tokens():
    model, rows = make("llama"), texts()
    found = estimate(model, rows, quantity=("gradient", "fisher_diag"), loss="token_mean", batch_tokens=20)
    sums = sample_gradients(model, rows, loss="token_sum")
    each = sum(text.targets for text in rows) / len(rows)
    for name, mean in found.mean("gradient").items():
        close(mean, sums[name].sum(0) / (each * len(rows)))
        close(found.mean("fisher_diag")[name], (sums[name] / each).square().mean(0))
    with pytest.raises(CurvatureError, match="loss is 'token_mean' in one"):
        found + estimate(model, rows[:2], quantity=("gradient", "fisher_diag"), loss="token_sum")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("block, sides", [("row", (2, -1)), ("column", (1, -2)), ("module", (1, 2))])
def test_blocks_by_name_are_sums_of_the_diagonal(kind, block, sides, tmp_path):
    found = estimate(make(kind), texts(), quantity=("fisher_diag", "fisher_blocks"), block=block)
    for name, blocks in found["fisher_blocks"].items():
        diag = found["fisher_diag"][name].double()
        kept = {"row": diag.sum(-1, keepdim=True), "column": diag.sum(-2, keepdim=True)}
        close(blocks, kept.get(block, diag.sum((-2, -1), keepdim=True)))
    found.save(tmp_path / "f.safetensors")
    assert Statistics.load(tmp_path / "f.safetensors").choices == found.choices


def test_modules_with_one_input_share_one_gram_in_memory_and_in_files(tmp_path):
    model, rows = make("llama"), texts()
    found = estimate(model, rows, quantity="input_gram", batch_tokens=20)
    grams = found["input_gram"]
    layer = "model.layers.0"
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({grams[f"{layer}.{name}.weight"].data_ptr() for name in names}) == 1
    assert len({tensor.data_ptr() for tensor in grams.values()}) == 8
    whole = estimate(model, rows, quantity="kfac", batch_tokens=1)
    for name, gram in grams.items():
        torch.testing.assert_close(gram, whole["input_gram"][name])
    file = tmp_path / "g.safetensors"
    found.save(file)
    assert file.stat().st_size < 1.5 * 4 * sum({t.data_ptr(): t.numel() for t in grams.values()}.values())
    loaded = Statistics.load(file)
    assert all(torch.equal(loaded["input_gram"][name], gram) for name, gram in grams.items())
    both = estimate(model, rows[:2], quantity="input_gram") + estimate(model, rows[2:], quantity="input_gram")
    assert len({tensor.data_ptr() for tensor in both["input_gram"].values()}) == 8
    for name, gram in grams.items():
        torch.testing.assert_close(both["input_gram"][name], gram)


def test_what_kinds_there_are():
    model = make("llama")
    norms = estimate(model, texts(), kinds=["norm"])["fisher_diag"]
    assert len(norms) == 5
    assert set(estimate(model, texts(), kinds=["embedding"])["fisher_diag"]) == {"model.embed_tokens.weight"}
    with pytest.raises(ValueError, match="kinds is 'norms'; wanted one of"):
        estimate(model, texts(), kinds=["norms"])


class Quantised(torch.nn.Linear):
    """Its weight is bytes, as bitsandbytes' are."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.float() * self.scale)


def test_quantised_weights_are_refused_and_their_adapter_is_measured():
    peft = pytest.importorskip("peft")
    model = make("llama")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    for layer in model.model.layers:
        layer.self_attn.q_proj.base_layer = Quantised(layer.self_attn.q_proj.base_layer)
        layer.mlp.up_proj = Quantised(layer.mlp.up_proj)
    with pytest.raises(CurvatureError, match=r"matches nothing.*; 4 more are quantised and have no gradient"):
        estimate(adapted, texts(), include=["*up_proj*"])
    found = estimate(adapted, texts())
    assert sum("lora_" in name for name in found["fisher_diag"]) == 4
    assert sum("up_proj" in name for name in found.unmeasured) == 2


def test_a_directory_will_do(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    found = estimate(tmp_path, texts())
    for name, tensor in estimate(model, texts())["fisher_diag"].items():
        torch.testing.assert_close(found["fisher_diag"][name], tensor)


def peak_of_tensors(run):
    """Bytes of tensors that were alive together while ``run`` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, result


@pytest.mark.parametrize("quantity", ["fisher_diag", "kfac", "ekfac", "low_rank", "fisher_blocks"])
@pytest.mark.parametrize("batch_tokens", [64, 1000])
def test_memory_is_told_before(quantity, batch_tokens):
    model = make("llama", hidden_size=64, intermediate_size=172, vocab_size=500)
    rows = texts((60,) * 8, 500)
    told = memory_needed(model, rows, quantity=quantity, batch_tokens=batch_tokens)
    peak, found = peak_of_tensors(lambda: estimate(model, rows, quantity=quantity, batch_tokens=batch_tokens))
    kept = sum({t.data_ptr(): t.nbytes for of in found.sums.values() for t in of.values()}.values())
    assert kept <= told.statistics
    assert 0.7 < peak / told.extra < 1.3
    if quantity == "fisher_diag":
        assert peak < 1.3 * kept + told.activations


def test_every_kind_is_covered_by_memory():
    model = make("mixtral")
    told = memory_needed(model, texts(), kinds=KINDS, include=["*"])
    found = estimate(model, texts(), kinds=KINDS, include=["*"])
    biases = [name for name in found["fisher_diag"] if name.endswith("bias")]
    assert not biases
    assert told.statistics == sum(t.nbytes for t in found["fisher_diag"].values())
    assert told.model == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
