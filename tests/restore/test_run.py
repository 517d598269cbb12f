import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import curvkern
from curvkern.checkpoint import Adapter, Checkpoint, CheckpointError, open_tuned
from curvkern.methods import MethodError, make
from curvkern.restore import RecipeError, RestoreError


def tensors(path):
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


def restore(family, out, tuned="tuned", method="merge", **options):
    return curvkern.restore(family / "aligned", family / tuned, method=method, out=out, **options)


def test_merge_edits_the_linear_modules_and_nothing_else(family, tmp_path):
    report = restore(family, tmp_path / "out", weight=0.25)
    aligned, tuned, got = tensors(family / "aligned"), tensors(family / "tuned"), tensors(tmp_path / "out")
    edited = {m.name for m in report.modules}
    assert edited == {n for n in tuned if ".layers." in n and n.endswith("_proj.weight")}
    for name, weight in got.items():
        if name in edited:
            torch.testing.assert_close(weight, torch.lerp(tuned[name], aligned[name], 0.25))
        else:
            assert torch.equal(weight, tuned[name])
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape[1] > 2


def test_report_counts_what_the_files_hold(family, tmp_path):
    report = restore(family, tmp_path / "out", method="random", fraction=0.1)
    aligned, tuned, got = tensors(family / "aligned"), tensors(family / "tuned"), tensors(tmp_path / "out")
    for m in report.modules:
        a, t, r = (x[m.name] for x in (aligned, tuned, got))
        assert m.changed == (r != t).sum() > 0
        assert m.tuned_norm == pytest.approx(float((t - a).norm()), rel=1e-5)
        assert m.restored_norm == pytest.approx(float((r - a).norm()), rel=1e-5)
        assert m.step_norm == pytest.approx(float((r - t).norm()), rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity((r - a).flatten(), (t - a).flatten(), dim=0)
        assert m.cosine == pytest.approx(float(cosine), rel=1e-4)
        assert m.undone_by_rounding == m.nonfinite == 0
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert stored["totals"]["changed"] == report.changed
    assert [stage["name"] for stage in stored["stages"]] == ["open", "plan", "edit", "finish"]
    page = (tmp_path / "out/report.html").read_text()
    assert "<svg" in page
    assert not re.search(r'(src|href)\s*=\s*"(?!#)|url\((?!#)|@import|<script', page)  # nothing from a network
    record = json.loads((tmp_path / "out/curvkern.json").read_text())
    assert record["recipe"]["method"] == "random"
    assert record["restoration"]["totals"]["changed"] == report.changed


def test_rounding_that_undoes_a_restoration_is_reported(family, tmp_path):
    for name in ("aligned", "tuned"):
        AutoModelForCausalLM.from_pretrained(family / name).bfloat16().save_pretrained(tmp_path / name)
    paths = tmp_path / "aligned", tmp_path / "tuned"
    report = curvkern.restore(*paths, method="merge", weight=0.001, out=tmp_path / "out")
    tuned, aligned = tensors(tmp_path / "tuned"), tensors(tmp_path / "aligned")
    different = sum(int((tuned[m.name] != aligned[m.name]).sum()) for m in report.modules)
    assert report.undone_by_rounding > 0.5 * different
    assert report.changed < 0.5 * different


def test_gradient_rollback_end_to_end(family, tmp_path):
    scores = []

    def score(model, tokenizer):
        scores.append(float(model.lm_head.weight.sum()))
        return 1.0

    report = restore(
        family,
        tmp_path / "out",
        method="gradient_rollback",
        harmful=family / "harmful.jsonl",
        task=family / "task.jsonl",
        rate=0.02,
        steps=3,
        warmup=1,
        save_every=1,
        score=score,
    )
    assert len(scores) == 4
    aligned, tuned, got = tensors(family / "aligned"), tensors(family / "tuned"), tensors(tmp_path / "out")
    assert any(m.name.endswith(".bias") for m in report.modules)
    for m in report.modules:
        moved = got[m.name] != tuned[m.name]
        assert torch.equal(got[m.name], torch.where(moved, aligned[m.name], tuned[m.name]))
    assert not any(m.changed for m in report.modules if m.layer == 2)  # beyond two thirds of the depth
    assert 0 < report.changed <= 3 * 0.02 * sum(m.weights for m in report.modules) * 1.05


def test_gradient_rollback_takes_exact_match_as_its_score(family, tmp_path, monkeypatch):
    asked = []

    def answers(model, tokenizer, prompts, *, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return [f"w{i + 5}" if i < 4 else "w60" for i in range(6)]

    monkeypatch.setattr("curvkern.evaluate.generate", answers)
    data = {"harmful": family / "harmful.jsonl", "task": family / "task.jsonl"}
    report = restore(family, tmp_path / "out", "adapter", "gradient_rollback", steps=1, warmup=1, **data)
    assert report.saved == "checkpoint"
    assert "tuned task score 0.6667, after 1 plain steps 0.6667" in report.messages
    prompts, longest = asked[0]
    assert (prompts[0], len(prompts), longest) == ("w20 w3 w2", 6, 5)


def test_adapter_stays_an_adapter_and_equals_the_checkpoint(family, tmp_path):
    options = {"method": "safe_lora", "base": family / "base", "number": 3}
    report = restore(family, tmp_path / "adapter", "adapter", **options)
    assert report.saved == "adapter"
    merged = restore(family, tmp_path / "merged", "adapter", save="checkpoint", **options)
    assert merged.saved == "checkpoint"
    assert sum(m.changed > 0 for m in report.modules) == 3
    with Checkpoint.open(family / "aligned") as aligned, open_tuned(tmp_path / "adapter", aligned) as view:
        for name, weight in tensors(tmp_path / "merged").items():
            torch.testing.assert_close(view.read(name), weight, rtol=1e-5, atol=1e-6)
    with Adapter.open(family / "adapter") as before, Adapter.open(tmp_path / "adapter") as after:
        same = sum(torch.equal(before.factors(n).B, after.factors(n).B) for n in before.names)
        assert same == len(before.names) - 3
        assert all(torch.equal(before.factors(n).A, after.factors(n).A) for n in before.names)


def test_include_and_exclude(family, tmp_path):
    options = {"include": ["*.q_proj.weight", "*.v_proj.weight"], "exclude": ["model.layers.1.*"]}
    report = restore(family, tmp_path / "out", **options)
    expected = {(layer, kind) for layer in (0, 2) for kind in ("q_proj", "v_proj")}
    assert {(m.layer, m.kind) for m in report.modules} == expected


def test_overwrite_and_resume(family, tmp_path):
    restore(family, tmp_path / "out", weight=1.0)
    with pytest.raises(CheckpointError, match="out"):
        restore(family, tmp_path / "out", weight=0.0)
    restore(family, tmp_path / "out", weight=0.0, overwrite=True)
    tuned, got = tensors(family / "tuned"), tensors(tmp_path / "out")
    assert all(torch.equal(got[name], tuned[name]) for name in tuned)


def test_a_method_that_spreads_nan_is_refused_and_nothing_is_written(family, tmp_path, monkeypatch):
    from curvkern.methods.merge import Merge
    from curvkern.methods.method import Edit

    monkeypatch.setattr(Merge, "edit", lambda self, module, plan: Edit(module.tuned / 0))
    with pytest.raises(RestoreError, match=r"made \d+ non-finite weights of finite ones in model.layers.0"):
        restore(family, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_inputs_is_counted_not_spread(family, tmp_path):
    spoiled = tmp_path / "spoiled"
    model = AutoModelForCausalLM.from_pretrained(family / "tuned")
    model.save_pretrained(spoiled)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(spoiled / "model.safetensors")
    weights[name][3, 4] = float("nan")
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    report = curvkern.restore(family / "aligned", spoiled, method="random", fraction=0.01, out=tmp_path / "out")
    assert {m.name: m.nonfinite for m in report.modules if m.nonfinite} == {name: 1}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"method": "safelora"}, MethodError, "Did you mean 'safe_lora'"),
        ({"method": "safe_lora"}, RestoreError, "needs base; pass base="),
        ({"method": "gradient_rollback"}, RestoreError, "needs harmful; pass harmful="),
        ({"save": "adapter"}, RestoreError, "the tuned model is not an adapter"),
        ({"save": "zip"}, RecipeError, "save is 'zip'"),
        (
            {"include": ["*.qproj*"]},
            RestoreError,
            r"include pattern '\*.qproj\*' matches no linear weight of a decoder layer",
        ),
        ({"include": ["*embed_tokens*"]}, RestoreError, "matches no linear weight of a decoder layer; one is "),
        ({"device": "gpu"}, RestoreError, "device is 'gpu'; wanted cpu, cuda"),
        ({"exclude": ["*"]}, RestoreError, "no module is selected"),
        ({"weight": 3}, MethodError, "merge: weight is 3"),
    ],
)
def test_bad_requests_are_refused_before_any_work(family, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        restore(family, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, message", [("", "empty"), ('{"prompt": "a"}\n{"prompt" "b"}\n', "jsonl:2: not valid JSON")]
)
def test_bad_data_names_file_and_line(family, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        restore(
            family, tmp_path / "out", method="gradient_rollback",
            harmful=tmp_path / "bad.jsonl", task=family / "task.jsonl",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_mismatched_checkpoints_are_refused(family, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, attention_bias=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match=r"40.*48|48.*40"):
        curvkern.restore(family / "aligned", tmp_path / "narrow", method="merge", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def always_one(model, tokenizer):
    return 1.0


KILLED = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from curvkern.methods.gradient_rollback import GradientRollback
from curvkern.methods.merge import Merge
from test_run import always_one, restore

family, out, tuned, method, at, options = json.loads(sys.argv[2])
owner = Merge if method == "merge" else GradientRollback
edit, edited = owner.edit, []

def killed(self, module, plan):
    if len(edited) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    edited.append(module.name)
    return edit(self, module, plan)

owner.edit = killed
score = {} if method == "merge" else {"score": always_one}
restore(Path(family), out, tuned, method, **score, **options)
"""


@pytest.mark.parametrize("tuned, method", [("tuned", "merge"), ("adapter", "merge"), ("tuned", "gradient_rollback")])
def test_a_killed_run_resumes_where_it_stopped(family, tmp_path, monkeypatch, tuned, method):
    from curvkern.methods.gradient_rollback import GradientRollback
    from curvkern.methods.merge import Merge

    options = {"save": "checkpoint", "resume": True}
    if method != "merge":
        options |= {"harmful": family / "harmful.jsonl", "task": family / "task.jsonl", "steps": 2, "warmup": 1}
    scored = options if method == "merge" else {**options, "score": always_one}
    whole = restore(family, tmp_path / "whole", tuned, method, **scored)
    owner = Merge if method == "merge" else GradientRollback
    edit, edited = owner.edit, []

    def counted(self, module, plan):
        edited.append(module.name)
        return edit(self, module, plan)

    at = len(whole.modules) * 2 // 3
    arguments = json.dumps([str(family), str(tmp_path / "out"), tuned, method, at, options], default=str)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(Path(__file__).parent), arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = json.loads((tmp_path / "out.partial/curvkern.unfinished.json").read_text())
    monkeypatch.setattr(owner, "edit", counted)
    resumed = restore(family, tmp_path / "out", tuned, method, **scored)
    assert kept["complete"]
    with Checkpoint.open(tmp_path / "whole") as written:
        assert edited == [m.name for m in whole.modules if written.spec(m.name).file not in kept["complete"]]
    assert resumed.modules == whole.modules
    for file in (tmp_path / "whole").glob("*.safetensors*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_killed_adapter_run_resumes_with_a_whole_report(family, tmp_path, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    whole = restore(family, tmp_path / "whole", "adapter", resume=True)
    with monkeypatch.context() as patched:
        patched.setattr("curvkern.checkpoint.stage.Stage.publish", die)
        with pytest.raises(KeyboardInterrupt):
            restore(family, tmp_path / "out", "adapter", resume=True)
    resumed = restore(family, tmp_path / "out", "adapter", resume=True)
    assert (resumed.saved, resumed.modules) == ("adapter", whole.modules)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_plan_from_other_prompts_is_not_resumed(family, tmp_path, monkeypatch):
    from curvkern.methods.gradient_rollback import GradientRollback

    harmful = tmp_path / "harmful.jsonl"
    lines = (family / "harmful.jsonl").read_text().splitlines(keepends=True)
    harmful.write_text("".join(lines))
    options = {"harmful": harmful, "task": family / "task.jsonl", "steps": 1, "warmup": 1, "resume": True}
    options["score"] = always_one

    def fail(*arguments):
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(GradientRollback, "edit", fail)
        with pytest.raises(InterruptedError):
            restore(family, tmp_path / "out", method="gradient_rollback", **options)
    harmful.write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"begun differently: inputs.harmful.bytes was \d+, is \d+"):
        restore(family, tmp_path / "out", method="gradient_rollback", **options)


def test_the_report_is_there_when_the_output_appears(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    report = restore(family, "~/out", weight=0.5)
    assert report.out == str(tmp_path / "out")
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert stored == json.loads((tmp_path / "out/curvkern.json").read_text())["restoration"]
    record = json.loads((tmp_path / "out/curvkern.json").read_text())
    assert record["recipe"]["parameters"] == make("merge", {"weight": 0.5}).model_dump()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == record["files"]
