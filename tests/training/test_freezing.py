import finetuning
import pytest

from curvkern.training import freeze


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_matching_layers_are_frozen_and_thawed():
    model = finetuning.llama()
    everything = trained(model)
    frozen = freeze(model, ["model.layers.1.*", "*.norm.weight"])
    expected = {name for name in everything if name.startswith("model.layers.1.") or name == "model.norm.weight"}
    assert set(frozen.parameters) == expected == everything - trained(model)
    assert frozen.count == sum(p.numel() for name, p in model.named_parameters() if name in expected)
    frozen.thaw()
    assert trained(model) == everything


def test_adapters_of_frozen_layers_are_frozen_and_nothing_thaws_the_base():
    model = finetuning.adapted()
    before = trained(model)
    frozen = freeze(model, ["*.layers.0.*"])
    assert trained(model) == {name for name in before if ".layers.1." in name}
    frozen.thaw()
    assert trained(model) == before


def test_frozen_layers_do_not_move_in_training(tmp_path):
    model = finetuning.llama()
    model(**finetuning.batch()).loss.backward()
    freeze(model, ["model.layers.0.*"])
    before = finetuning.values(model)
    finetuning.trainer(model, tmp_path, [], optim="adamw_torch", weight_decay=0.1).train()
    same = {name for name, p in model.named_parameters() if p.equal(before[name])}
    assert same == {name for name in before if name.startswith("model.layers.0.")}


def test_wrong_patterns_change_nothing():
    model = finetuning.llama()
    everything = trained(model)
    with pytest.raises(
        ValueError, match=r"'model.layers.7.\*' matches no parameter; the names nearest to it are model"
    ):
        freeze(model, ["*.layers.0.*", "model.layers.7.*"])
    with pytest.raises(ValueError, match="the patterns match everything that is trained"):
        freeze(model, ["*"])
    with pytest.raises(TypeError, match=r"wanted a list of them: \['\*'\]"):
        freeze(model, "*")
    with pytest.raises(ValueError, match="there are no patterns"):
        freeze(model, [])
    assert trained(model) == everything
    freeze(model, ["*.layers.0.*"])
    with pytest.raises(ValueError, match="all 9 parameters that match are frozen already"):
        freeze(model, ["*.layers.0.*"])
