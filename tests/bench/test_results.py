"""What is printed, written and compared; the exit status."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from curvkern.bench import run as bench
from curvkern.bench.machine import Machine
from curvkern.bench.page import write_page
from curvkern.bench.providers import Provider, providers
from curvkern.bench.results import Row, read_csv, regressions, scaled, with_ratios, write_csv
from curvkern.bench.table import micro
from curvkern.cli import app

MACHINE = Machine("Chip(R) CPU @ 2.5GHz", "cpu", "2 cores", "torch 0", "abc", 1 << 16, 1e10, 1e11, 2e11)
OURS = Row("f_", "float32", "2x2", "cpu", "ours", median=100.0, p20=95.0, p80=105.0, bytes=10**6, floor=50.0)


@pytest.fixture
def printed(monkeypatch):
    """Runs the suite on tiny blends; returns (exit status, what it printed)."""
    monkeypatch.setattr(bench, "examine", lambda device: MACHINE)

    def run(*ops, **options):
        text = io.StringIO()
        ops = ops or ("blend_",)
        options = {"size": "tiny", "dtype": "fp32", "device": "cpu", "seconds": 0, **options}
        return bench.run(ops, console=Console(file=text, width=120), **options), text.getvalue()

    return run


def add(monkeypatch, *more):
    monkeypatch.setattr(bench, "providers", lambda *a: [*providers(*a), *more])


# the table ------------------------------------------------------------------------------------------------------------


def test_a_run_fits_its_columns_and_ends_well(printed):
    status, text = printed()
    assert status == 0
    assert "Chip(R) CPU @ 2.5GHz, 2 cores" in text
    assert "copy 10 GB/s" in text
    assert "blend_ float32 8x8: 768 B" in text
    assert re.search(r"^reference .* us .* 1\.00 ", text, re.MULTILINE)
    assert re.search(r"^cpu .* us ", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text


def test_losers_are_printed_like_winners(printed, monkeypatch):
    import time

    import curvkern

    def slow(*args):
        time.sleep(0.01)
        return curvkern.blend_(*args)

    add(monkeypatch, Provider("slow", slow, "ours"))
    status, text = printed()
    line = next(line for line in text.splitlines() if line.startswith("slow"))
    assert status == 0
    assert re.search(r"^slow +1\d(\.\d)? ms .* 0 +0\.0\d ", line), line


def test_a_wrong_kernel_is_printed_without_a_number_and_fails_the_run(printed, monkeypatch, tmp_path):
    add(monkeypatch, Provider("broken", lambda *a: None, "ours"))
    status, text = printed(csv=tmp_path / "out.csv")
    line = next(line for line in text.splitlines() if line.startswith("broken"))
    assert status == 1
    assert line.split() == ["broken", "WRONG"]
    assert "WRONG, so without figures: broken on blend_ float32 8x8" in text
    row = next(row for row in read_csv(tmp_path / "out.csv") if row.provider == "broken")
    assert (row.status, row.median) == ("wrong", None)


def test_a_wrong_peer_has_no_number_either_but_is_not_our_failure(printed, monkeypatch):
    add(monkeypatch, Provider("theirs", lambda *a: None))
    status, text = printed()
    assert status == 0
    assert re.search(r"^theirs +WRONG *$", text, re.MULTILINE)


def test_what_is_missing_is_named(printed, monkeypatch):
    add(monkeypatch, Provider("triton", print, "ours", missing="no driver"))
    monkeypatch.setattr(bench, "missing_peers", lambda: ["opacus"])
    status, text = printed()
    assert status == 0
    assert "triton n/a: no driver" in text
    assert "not installed, so not measured: opacus" in text
    assert "not asked for: torch.compile (--compile)" in text


def test_the_short_table_has_a_line_a_case_and_tells_who_is_ahead(printed, monkeypatch):
    assert "The best of ours" not in printed()[1], "one case is short enough"
    import curvkern

    add(monkeypatch, Provider("theirs", curvkern.blend_))
    status, text = printed("rollback", dtype=None)
    short = text[text.index("The best of ours") :]
    assert status == 0
    lines = re.findall(r"^blend_ +\S+ +8x8 +(?:cpu|reference) +\S+ us +\d+ +(\S+) +(\S+)", short, re.MULTILINE)
    assert len(lines) == 3
    assert all(0.5 < float(ahead) < 2 for _, ahead in lines), "the same function, so as fast"


def test_a_machine_that_was_busy_is_told_of():
    assert bench.disturbed(MACHINE, replace(MACHINE, copy=1.1e10, single=1.7e11)) == []
    (line,) = bench.disturbed(MACHINE, replace(MACHINE, copy=2e10))
    assert line == "the machine was not at rest, run again: copy 10 G/s before, 20 G/s after"


def test_no_case_is_begun_after_the_limit(printed):
    status, text = printed("rollback", dtype=None, limit=0)
    assert status == 0
    assert "out of time: 2 cases left out" in text
    assert text.count("reference ") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ops": ["blur_"]}, r"bench: no op blur_; there are .*blend_"),
        ({"size": "xl"}, r"no case of size 'xl' and dtype 'any'; sizes are tiny, s, m, l"),
        ({"dtype": "fp8"}, r"no case of size 's' and dtype 'fp8'"),
    ],
)
def test_a_choice_of_nothing_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        bench.choose(**{"ops": (), "dtype": None, "size": "s", **options})


def test_a_choice_by_stem_function_and_dtype():
    assert {case.function for case in bench.choose(["rollback"], None, "s")} == {"rollback_", "blend_"}
    chosen = bench.choose(["blend_"], "bf16", "s")
    assert {(case.function, case.dtype_name) for case in chosen} == {("blend_", "bfloat16")}


def test_numbers_have_three_digits():
    assert [micro(0.5), micro(12.34), micro(99999), micro(2.5e6)] == ["0.5 us", "12.3 us", "100 ms", "2.5 s"]
    assert [scaled(512), scaled(1234), scaled(12.6e6), scaled(999.9e9)] == ["512 ", "1.23 k", "12.6 M", "1 T"]


# files ----------------------------------------------------------------------------------------------------------------


def test_csv_keeps_rows(tmp_path):
    rows = [OURS, replace(OURS, provider="x", status="n/a", note='no "y", or z', median=None), replace(OURS, extra=7)]
    write_csv(tmp_path / "new" / "a.csv", MACHINE.header(), rows)
    assert read_csv(tmp_path / "new" / "a.csv") == rows
    write_csv(tmp_path / "new" / "a.csv", MACHINE.header(), rows[:1])
    assert read_csv(tmp_path / "new" / "a.csv") == rows[:1], "replaced, not appended"
    assert (tmp_path / "new" / "a.csv").read_text().startswith("# Chip(R)")


def test_another_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("op,time\nf,1\n")
    with pytest.raises(ValueError, match=r"a\.csv: not a table of curvkern bench"):
        read_csv(tmp_path / "a.csv")


def test_rates_and_ratios():
    rows = with_ratios([replace(OURS, provider="reference", median=400.0), OURS, replace(OURS, provider="compile")])
    assert [row.x_eager for row in rows] == [1, 4, 4]
    assert [row.x_compile for row in rows] == [0.25, 1, 1]
    assert (OURS.percent, OURS.rate) == (50, "10 GB/s")
    assert replace(OURS, flops=2 * 10**9, bound="flops").rate == "20 TFLOP/s"


@pytest.mark.parametrize(
    "now, slower",
    [
        ({"median": 130.0, "p20": 120.0}, 1.3),
        ({"median": 130.0, "p20": 104.0}, None),  # within the range of before
        ({"median": 109.0, "p20": 108.0}, None),  # less than a tenth
        ({"median": 60.0, "p20": 50.0}, None),
        ({"median": None, "p20": None}, None),
        ({"median": 130.0, "p20": 120.0, "kind": "peer"}, None),
        ({"median": 130.0, "p20": 120.0, "shape": "3x3"}, None),
    ],
)
def test_what_counts_as_a_regression(now, slower):
    row = replace(OURS, **now)
    assert regressions([OURS], [row]) == ({} if slower is None else {row.key: pytest.approx(slower)})


def test_a_regression_is_marked_and_fails_the_run(printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "benchmarks" / "results"
    kept.mkdir(parents=True)
    assert MACHINE.slug.startswith("chip-2.5ghz-")
    first, text = printed(csv=kept)
    assert first == 0
    assert "regressions" not in text
    (path,) = kept.iterdir()
    assert path.name == f"{MACHINE.slug}.csv"

    fast = [replace(row, median=row.median / 100, p20=row.p20 / 100, p80=row.p80 / 100) for row in read_csv(path)]
    write_csv(path, [], fast)
    second, text = printed()
    assert second == 1, "the file of this machine is compared with unasked"
    assert "cpu REGRESSION" in text
    assert "2 regressions against the earlier run" in text

    slow = [replace(row, median=row.median * 1e4, p20=row.p20 * 1e4, p80=row.p80 * 1e4) for row in fast]
    write_csv(tmp_path / "other.csv", [], slow)
    third, text = printed(compare=tmp_path / "other.csv")
    assert third == 0
    assert "0 regressions" in text


def test_the_page_needs_nothing_else(tmp_path):
    rows = [
        replace(OURS, provider=provider, op=op, dtype=dtype, flops=flops)
        for provider in ("reference", "cpu", "<peer>")
        for op, flops in (("f_", 0), ("g", 10**9))
        for dtype in ("float32", "bfloat16")
    ]
    rows.append(replace(OURS, provider="broken", status="wrong", median=None))
    write_page(tmp_path / "new" / "page.html", MACHINE, rows)
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("<svg") == 2
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)', page)
    assert "<script" not in page
    for provider in ("reference", "cpu", "&lt;peer&gt;", "broken"):
        assert f"<td>{provider}</td>" in page
    assert "<td>WRONG</td>" in page
    assert MACHINE.header()[2] in page


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_hands_everything_on(monkeypatch, tmp_path):
    taken = {}

    def fake(ops, **options):
        taken.update(options, ops=ops)
        return 1

    monkeypatch.setattr(bench, "run", fake)
    words = "bench fisher blend_ --limit 9 --dtype bf16 --size l --backend triton --compile --pass --seconds 2"
    words += f" --shape llama-3-8b --layers 2 --trace {tmp_path / 't.json'}"
    assert CliRunner().invoke(app, [*words.split(), "--csv", str(tmp_path)]).exit_code == 1
    assert taken == {
        "ops": ["fisher", "blend_"], "dtype": "bf16", "size": "l", "device": None, "backend": "triton",
        "compiled": True, "seconds": 2.0, "limit": 9.0, "passes": True, "compare": None, "csv": tmp_path, "html": None,
        "shape": "llama-3-8b", "layers": 2, "trace": tmp_path / "t.json",
    }  # fmt: skip
