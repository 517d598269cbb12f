import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EXPECTED = {
    "asft": "outside the alignment subspace",
    "gradient_surgery": "20 steps, ",
    "select_and_rollback": "rolled back 5243 of 524288 weights",
    "weight_ema": "the model is the average of its 40 steps",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs_and_prints_what_it_should(path, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment, "timeout": 120}
    done = subprocess.run([sys.executable, path], **options)
    assert done.returncode == 0, done.stderr
    assert EXPECTED[path.stem] in done.stdout
