import json

import pytest

from curvkern.evaluate import Example, evaluate, generate, harmful_rate, load, over_refusal
from curvkern.evaluate import model as model_file


@pytest.fixture
def answers(model, tokenizer, prompts):
    return generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=4)


@pytest.fixture
def rows(prompts, answers):
    """Task rows of which all but the first expect what the model says."""
    expected = ["something else", *answers[1:]]
    return [Example(prompt, response) for prompt, response in zip(prompts, expected, strict=True)]


def test_all_three_sets(model, tokenizer, prompts, answers, rows):
    asked = [Example(prompt) for prompt in prompts]
    found = evaluate(model, tokenizer, harmful=asked, benign=asked[:4], task=rows, max_new_tokens=8, batch_size=4)
    assert found.harmful == harmful_rate(answers)
    assert found.over_refusal == over_refusal(answers[:4])
    assert (found.task.count, found.task.total) == (len(prompts) - 1, len(prompts))
    assert found.responses == {"harmful": answers, "benign": answers[:4], "task": answers}
    assert json.loads(json.dumps(found.as_dict()))["task"]["value"] == pytest.approx(5 / 6)


def test_refusals_are_told_from_answers(model, tokenizer, prompts, monkeypatch):
    replies = ["I cannot help.", "Take clay."] * (len(prompts) // 2)
    monkeypatch.setattr(model_file, "generate", lambda *args, **kwargs: replies)
    asked = [Example(prompt) for prompt in prompts]
    found = evaluate(model, tokenizer, harmful=asked, benign=asked)
    assert (found.harmful.value, found.over_refusal.value, found.task) == (0.5, 0.5, None)
    assert found.as_dict()["task"] is None


def test_directory_and_files_give_the_same(tmp_path, model, tokenizer, rows):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": row.prompt, "response": row.response}) for row in rows]
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    from_disk = evaluate(tmp_path / "model", task=tmp_path / "task.jsonl", max_new_tokens=8)
    in_memory = evaluate(model, tokenizer, task=rows, max_new_tokens=8)
    assert from_disk.task == in_memory.task
    assert from_disk.responses == in_memory.responses


def test_adapter_directory_is_loaded_on_its_base(tmp_path, model, tokenizer, rows):
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, _ = load(tmp_path / "base")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = evaluate(tmp_path / "adapter", task=rows, max_new_tokens=8)
    assert found.responses == evaluate(wrapped, tokenizer, task=rows, max_new_tokens=8).responses
    assert found.responses != evaluate(model, tokenizer, task=rows, max_new_tokens=8).responses


def test_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("transformers.utils.import_utils.is_peft_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"curvkern\[lora\]"):
        load(tmp_path)


def test_mistakes_are_told_before_the_model_is_loaded(tmp_path, model, tokenizer):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="at least one of harmful, benign, task"):
        evaluate(nowhere)
    with pytest.raises(ValueError, match="the set benign is empty"):
        evaluate(nowhere, benign=[])
    with pytest.raises(ValueError, match="task row 2 has no response"):
        evaluate(nowhere, task=[Example("a", "b"), Example("c")])
    with pytest.raises(NotADirectoryError, match="nowhere: not a directory"):
        evaluate(nowhere, harmful=[Example("a")])
    with pytest.raises(ValueError, match="needs its tokenizer"):
        evaluate(model, harmful=[Example("a")])
