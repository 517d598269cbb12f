"""From directories and JSON Lines to a file and a page, from Python and from the command line."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from curvkern.cli import app
from curvkern.curvature import CurvatureError, Statistics, estimate, from_answer
from curvkern.evaluate import read_jsonl
from curvkern.measure import measure
from curvkern.report.statistics import concentration, cosine


@pytest.fixture
def texts(family):
    tokenizer = AutoTokenizer.from_pretrained(family / "aligned")
    return [from_answer(tokenizer, row.asked(), row.response) for row in read_jsonl(family / "task.jsonl")]


def test_the_file_holds_what_estimate_finds(family, tmp_path, texts):
    found = measure(family / "aligned", family / "task.jsonl", tmp_path / "s.safetensors", quantity=["fisher_diag"])
    expected = estimate(AutoModelForCausalLM.from_pretrained(family / "aligned"), texts)
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.counts == found.counts == expected.counts
    for name, tensor in expected["fisher_diag"].items():
        assert torch.equal(loaded["fisher_diag"][name], tensor)


def test_the_page_stands_alone(family, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    measure(family / "aligned", family / "harmful.jsonl", first)
    wanted = ["fisher_diag", "kfac", "hessian_diag", "gradient"]
    html = tmp_path / "page.html"
    measure(family / "aligned", family / "task.jsonl", second, quantity=wanted, probes=2, html=html, against=first)
    page = html.read_text()
    assert page.count("<svg") == 6  # two maps, concentration, two spectra, one overlap
    for text in ("overlap with the other data", "spectra", "trace of model.layers.0", "task.jsonl"):
        assert text in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_interrupted_work_is_kept_and_resumed(family, tmp_path):
    out = tmp_path / "s.safetensors"
    whole = measure(family / "aligned", family / "task.jsonl", tmp_path / "whole.safetensors", batch_tokens=1)

    def interrupt(logits, labels):
        os.kill(os.getpid(), signal.SIGINT)
        return mean(logits, labels)

    def mean(logits, labels):
        kept = labels[:, 1:] != -100
        picked = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return -(picked * kept).sum(1) / kept.sum(1)

    interrupt.__qualname__ = mean.__qualname__ = "mean"
    before = signal.getsignal(signal.SIGINT)
    part = measure(family / "aligned", family / "task.jsonl", out, batch_tokens=1, loss=interrupt)
    assert part.counts.rows == 1
    assert signal.getsignal(signal.SIGINT) is before
    resumed = measure(family / "aligned", family / "task.jsonl", out, batch_tokens=1, loss=mean, resume=True)
    assert resumed.counts == whole.counts
    for name, tensor in whole["fisher_diag"].items():
        torch.testing.assert_close(resumed["fisher_diag"][name], tensor, rtol=1e-3, atol=1e-9)


def test_from_the_command_line(family, tmp_path):
    out = tmp_path / "s.safetensors"
    arguments = [
        "curvature",
        str(family / "aligned"),
        "--data",
        str(family / "task.jsonl"),
        "--out",
        str(out),
        "--quiet",
    ]
    done = CliRunner().invoke(app, [*arguments, "--quantity", "fisher_diag,gradient", "--include", "*layers.1*"])
    assert done.exit_code == 0, done.output
    assert "gradient, fisher_diag of 6 rows" in done.output
    assert "not measured: " in done.output
    assert all(".1." in name for name in Statistics.load(out)["gradient"])
    told = CliRunner().invoke(app, [*arguments[:-1], "--overwrite", "--quantity", "fisher_blocks", "--block", "row"])
    assert "memory needed: statistics" in told.output
    assert Statistics.load(out).choices.block == "row"
    CliRunner().invoke(app, [*arguments, "--overwrite", "--quantity", "gradient"])
    held = Statistics.load(out)
    done = CliRunner().invoke(app, [*arguments, "--overwrite", "--quantity", "gradient", "--layerwise"])
    assert done.exit_code == 0, done.output
    assert Statistics.load(out).choices == held.choices
    assert all(torch.equal(t, held["gradient"][name]) for name, t in Statistics.load(out)["gradient"].items())
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, FileExistsError)
    assert "pass --overwrite to replace it" in str(again.exception)
    wrong = CliRunner().invoke(app, [*arguments, "--overwrite", "--quantity", "fisher"])
    assert "quantity is 'fisher'; wanted one of" in str(wrong.exception)
    assert "gradient" in Statistics.load(out).sums


def test_bad_input_is_told_before_work(family, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w1", "response": "w2"}) + "\n" + json.dumps({"prompt": "w1"}) + "\n")
    with pytest.raises(CurvatureError, match=r"rows.jsonl: 1 of 2 rows have no response .* rows 2"):
        measure(family / "aligned", rows, tmp_path / "s.safetensors")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        measure(family / "aligned", family / "task.jsonl", tmp_path / "no" / "s.safetensors")
    with pytest.raises(FileNotFoundError, match="choose another --html"):
        measure(family / "aligned", family / "task.jsonl", tmp_path / "s.safetensors", html=tmp_path / "no" / "p.html")
    with pytest.raises(CurvatureError, match="have no response"):  # before the model is looked for
        measure(tmp_path / "nothing", rows, tmp_path / "s.safetensors")
    with pytest.raises(NotADirectoryError):
        measure(tmp_path / "nothing", family / "task.jsonl", tmp_path / "s.safetensors")
    measure(family / "aligned", family / "task.jsonl", tmp_path / "s.safetensors", batch_tokens=1)
    with pytest.raises(CurvatureError, match=r"model was '.*', is '.*'"):
        measure(family / "tuned", family / "task.jsonl", tmp_path / "s.safetensors", resume=True)


def test_concentration_of_known_values():
    share, part = concentration({"a": torch.tensor([1.0, 1.0, 2.0]), "b": torch.tensor([-4.0])})
    assert share == pytest.approx([0.25, 0.5, 1.0])
    assert part == pytest.approx([0.5, 0.75, 1.0])
    assert concentration({"a": torch.zeros(3)})[0][-1] == 1


def test_cosine():
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])) == 1
    assert cosine(torch.zeros(2), torch.ones(2)) == 0
