"""Statistics that a method asks for: the right model, the right data, once; shared between runs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.curvature import Choices, Statistics, estimate, from_answer
from curvkern.evaluate import load, read_jsonl
from curvkern.methods import Edit, Method, Need
from curvkern.methods import get as get_method
from curvkern.restore import RestoreError
from curvkern.restore.evidence import ModuleStatistics

NEEDS = (
    Need("gradient", "harmful"),
    Need("input_gram", "harmful", at="aligned"),
    Need("fisher_diag", "task"),
    Need("fisher_diag", "task", loss="token_sum"),
    Need("low_rank", "task"),
)


class Looking(Method):
    """Keeps what it is shown and edits nothing."""

    name = "looking"
    source = "test"

    def statistics(self):
        return NEEDS

    def edit(self, module, plan):
        SEEN[module.name] = dict(module.statistics)
        return Edit()


SEEN = {}


@pytest.fixture(autouse=True)
def _looking(monkeypatch):
    SEEN.clear()
    monkeypatch.setattr("curvkern.methods.get", lambda name: Looking if name == "looking" else get_method(name))


@pytest.fixture
def data(family):
    return {"harmful": family / "harmful.jsonl", "task": family / "task.jsonl"}


def look(family, out, data, tuned="tuned", **options):
    return curvkern.restore(family / "aligned", family / tuned, method="looking", out=out, **data, **options)


def expected(model, tokenizer, path, quantity, loss):
    texts = [from_answer(tokenizer, row.asked(), row.response) for row in read_jsonl(path)]
    return estimate(model, texts, quantity=quantity, loss=loss)


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_every_module_gets_what_estimate_finds(family, tmp_path, data, tuned):
    report = look(family, tmp_path / "out", data, tuned)
    tokenizer = AutoTokenizer.from_pretrained(family / "aligned")
    models = {"aligned": load(family / "aligned")[0]}
    if tuned == "tuned":
        models["tuned"] = load(family / "tuned")[0]
    else:
        import peft

        base = AutoModelForCausalLM.from_pretrained(family / "aligned")
        models["tuned"] = peft.PeftModel.from_pretrained(base, family / "adapter").merge_and_unload()
    asked = {"input_gram": "kfac"}
    for need in NEEDS:
        quantity = asked.get(need.quantity, need.quantity)
        found = expected(models[need.at], tokenizer, data[need.data], quantity, need.loss)
        wanted = found[need.quantity] if need.quantity == "low_rank" else found.mean(need.quantity)
        for module in report.modules:
            close = {"rtol": 2e-2, "atol": 1e-4} if need.quantity == "low_rank" else {"rtol": 1e-3, "atol": 1e-7}
            torch.testing.assert_close(SEEN[module.name][need], wanted[module.name], **close)


def test_a_directory_of_statistics_is_shared(family, tmp_path, data, monkeypatch):
    kept = tmp_path / "kept"
    look(family, tmp_path / "first", data, statistics=kept)
    before = {name: dict(of) for name, of in SEEN.items()}
    assert len(list(kept.iterdir())) == len(NEEDS)
    assert all(isinstance(Statistics.load(path), Statistics) for path in kept.iterdir())

    def fail(*arguments, **options):
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr("curvkern.curvature.estimate", fail)
        report = look(family, tmp_path / "second", data, statistics=kept)
        with pytest.raises(InterruptedError):
            look(family, tmp_path / "third", {**data, "task": data["harmful"]}, statistics=kept)
        with pytest.raises(InterruptedError):
            look(family, tmp_path / "third", data, "adapter", statistics=kept)
    assert sorted(line.split(": from ")[0] for line in report.messages) == sorted(
        f"{need.quantity} of {need.data} data at {need.at}" for need in NEEDS
    )
    for name, found in before.items():
        for need, tensor in found.items():
            assert torch.equal(SEEN[name][need], tensor)
    record = json.loads((tmp_path / "second/curvkern.json").read_text())
    assert "statistics" not in record["recipe"]


def test_statistics_of_fewer_modules_are_made_anew(family, tmp_path, data):
    kept = tmp_path / "kept"
    look(family, tmp_path / "some", data, statistics=kept, include=["*layers.1.*"])
    assert {name.split(".")[2] for name in SEEN} == {"1"}
    report = look(family, tmp_path / "all", data, statistics=kept)
    assert not report.messages
    assert {name.split(".")[2] for name in SEEN} == {"0", "1", "2"}
    assert len(list(kept.iterdir())) == len(NEEDS)


def test_rows_without_a_response_are_named_before_any_work(family, tmp_path, data):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w1", "response": "w2"}) + "\n" + json.dumps({"prompt": "w1"}) + "\n")
    with pytest.raises(RestoreError, match=r"rows.jsonl: 1 of 2 rows have no response, the first are rows 2; looking"):
        look(family, tmp_path / "out", {**data, "task": rows})
    assert not (tmp_path / "out").exists()


def test_data_that_a_statistic_needs_are_asked_for(family, tmp_path, data):
    with pytest.raises(RestoreError, match=r"method 'looking' needs task; pass task=\.\.\. \(--task\)"):
        look(family, tmp_path / "out", {"harmful": data["harmful"]})
    report = look(family, tmp_path / "out", data, base=family / "base")
    assert "looking does not look at base" in report.messages


def test_a_directory_that_cannot_be_made(family, tmp_path, data):
    (tmp_path / "file").touch()
    with pytest.raises(RestoreError, match=r"statistics=.*file: File exists"):
        look(family, tmp_path / "out", data, statistics=tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_a_module_that_was_not_measured_is_named():
    found = Statistics(Choices("model"), sums={"gradient": {"a.0.weight": torch.zeros(2, 2)}})
    with pytest.raises(
        RestoreError, match=r"b.0.weight and 0 more have no gradient: the tuned model does not run them"
    ):
        ModuleStatistics().add({Need("gradient", "task"): found}, ["a.0.weight", "b.0.weight"])


def test_an_adapter_beside_a_whole_head(family, tmp_path, data):
    """What the adapter replaces whole is in the model that is measured, too."""
    import peft

    base = AutoModelForCausalLM.from_pretrained(family / "aligned")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, lora)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(3)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(family / "aligned").save_pretrained(tmp_path / "adapter")
    curvkern.restore(family / "aligned", tmp_path / "adapter", method="looking", out=tmp_path / "out", **data)
    with_head = SEEN["model.layers.0.mlp.up_proj.weight"][NEEDS[0]]
    look(family, tmp_path / "plain", data)
    tokenizer = AutoTokenizer.from_pretrained(family / "aligned")
    found = expected(model.merge_and_unload(), tokenizer, data["harmful"], "gradient", "response_mean")
    torch.testing.assert_close(
        with_head, found.mean("gradient")["model.layers.0.mlp.up_proj.weight"], rtol=1e-3, atol=1e-7
    )
    with Checkpoint.open(tmp_path / "out") as written, Checkpoint.open(family / "aligned") as aligned:
        torch.testing.assert_close(written.read("lm_head.weight"), 3 * aligned.read("lm_head.weight"))
