"""The benchmark of all methods: that it runs small, and what it says."""

import csv
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "methods.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder, and the rows of a second run, beside which those of a first are kept."""
    pytest.importorskip("peft")
    out, measure = tmp_path_factory.mktemp("benchmark"), runpy.run_path(str(SCRIPT))["measure"]
    measure(out, "tiny", ["merge"], ["lora"])
    return out, measure(out, "tiny", ["lax"], ["lora"])


def test_a_row_for_each_method_says_what_it_took(measured):
    out, (_, row) = measured
    assert (row["method"], row["kind"], row["saved"], row["error"]) == ("merge", "lora", "adapter", "")
    assert float(row["seconds"]) > 0
    assert float(row["peak_mib"]) >= 0
    assert 50 < float(row["changed_percent"]) <= 100  # half way to the aligned model, in bfloat16
    with (out / "methods.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[1] == row


def test_a_run_that_fails_says_why(measured):
    _, (row, _) = measured
    assert "unknown method 'lax'" in row["error"]
    assert not row.get("seconds")


def test_a_table_of_what_ran_and_what_did_not(measured):
    heads, _, failed, ran = runpy.run_path(str(SCRIPT))["table"](measured[1])
    assert heads.startswith("| method | tuned | seconds |")
    assert failed.startswith("| lax | lora |  |")
    assert "unknown method 'lax'" in failed
    assert ran.startswith("| merge | lora | ")
    assert ran.endswith(" | adapter |")
