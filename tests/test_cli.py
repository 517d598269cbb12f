import subprocess
import sys

import pytest


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "curvkern", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_restore_writes_a_checkpoint_and_prints_the_table(family, tmp_path):
    done = run(
        "restore", "--aligned", family / "aligned", "--tuned", family / "tuned",
        "--method", "merge", "--set", "weight=0.25", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "what changed" in done.stdout
    assert (tmp_path / "out/report.html").is_file()


def test_recipe_with_overrides(family, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"aligned: {family}/aligned\ntuned: {family}/tuned\nmethod: merge\nparameters: {{weight: 0.5}}\n")
    done = run("restore", recipe, "--out", tmp_path / "out", "--set", "weight=0.125", "--quiet")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert '"weight": 0.125' in (tmp_path / "out/report.json").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "mergee"], "Did you mean 'merge'"),
        (["--method", "merge", "--set", "weight"], "write key=value"),
        ([], "method is missing"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(family, tmp_path, arguments, message):
    inputs = ["--aligned", family / "aligned", "--tuned", family / "tuned", "--out", tmp_path / "out"]
    done = run("restore", *inputs, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
