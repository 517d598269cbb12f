"""The trace of a pass: what Chrome reads, threads apart, and the line that names the limit."""

import json
import threading
import time

import pytest

import curvkern
from curvkern.restore import make_recipe, run_recipe
from curvkern.trace import Span, Trace, covered, span, tracing


def events(path):
    found = json.loads(path.read_text())["traceEvents"]
    return [e for e in found if e["ph"] == "X"], {e["tid"]: e["args"]["name"] for e in found if e["ph"] == "M"}


def restore(family, out, **options):
    return curvkern.restore(family / "aligned", family / "tuned", out=out, method="merge", **options)


def test_a_restoration_leaves_a_trace_and_says_what_it_waited_for(family, tmp_path):
    report = restore(family, tmp_path / "out", trace=tmp_path / "trace.json")
    spans, threads = events(tmp_path / "trace.json")
    edited = [e for e in spans if e["cat"] == "compute"]
    assert [e["name"] for e in edited] == [module.name for module in report.modules]
    assert {e["name"] for e in spans if e["cat"] == "stage"} >= {"open", "edit", "finish"}
    reads = {threads[e["tid"]] for e in spans if e["cat"] == "read"}
    assert reads == {"curvkern-read"}
    assert {threads[e["tid"]] for e in edited} == {"MainThread"}
    read, written = (sum(e["args"]["bytes"] for e in spans if e["cat"] == kind) for kind in ("read", "write"))
    assert read == 2 * sum(module.weights for module in report.modules) * 4
    assert written == data_bytes(family / "tuned")
    assert all(e["ts"] >= 0 and e["dur"] >= 0 and e["pid"] for e in spans)
    assert " was the limit: busy " in report.messages[-1]
    assert "GB/s" in report.messages[-1]
    assert report.messages[-1] in json.loads((tmp_path / "out" / "report.json").read_text())["messages"]


def data_bytes(directory):
    files = [path.read_bytes() for path in directory.glob("*.safetensors")]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)


def test_statistics_are_spans_too(family, tmp_path):
    restore_options = {"harmful": family / "harmful.jsonl", "out": tmp_path / "out", "method": "ascent"}
    recipe = make_recipe({"aligned": family / "aligned", "tuned": family / "tuned", **restore_options})
    run_recipe(recipe, trace=tmp_path / "trace.json")
    spans, _ = events(tmp_path / "trace.json")
    assert [e["name"] for e in spans if e["cat"] == "statistics"] == ["statistics"]


def test_nothing_is_recorded_unless_asked_for(family, tmp_path):
    assert span("a", "read") is span("b", "write", bytes=3)
    assert not any("was the limit" in line for line in restore(family, tmp_path / "out").messages)


def test_a_trace_of_what_failed_is_kept(tmp_path):
    def fail():
        with tracing(tmp_path / "t.json"), span("part", "compute"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert [e["name"] for e in events(tmp_path / "t.json")[0]] == ["part"]
    with tracing(tmp_path / "again.json"):
        pass
    assert events(tmp_path / "again.json") == ([], {})


def test_threads_have_rows_of_their_own(tmp_path):
    def work():
        with span("there", "read"):
            time.sleep(0.01)

    with tracing(tmp_path / "t.json"):
        thread = threading.Thread(target=work, name="reader")
        thread.start()
        with span("here", "compute"):
            thread.join()
    spans, threads = events(tmp_path / "t.json")
    there, here = sorted(spans, key=lambda e: e["dur"])
    assert (threads[there["tid"]], threads[here["tid"]]) == ("reader", "MainThread")
    assert there["dur"] >= 10_000


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(family, tmp_path):
    with pytest.raises(ValueError, match=r"trace: .*no/t.json: cannot be written: No such file or directory; give"):
        restore(family, tmp_path / "out", trace=tmp_path / "no" / "t.json")
    assert not (tmp_path / "out").exists()
    with (
        tracing(tmp_path / "one.json"),
        pytest.raises(ValueError, match="another trace is being recorded"),
        tracing(tmp_path / "two.json"),
    ):
        pass


@pytest.mark.parametrize(
    "spans, said",
    [
        ([("read", 0, 6, {"bytes": 12e9}), ("compute", 5, 7, {"bytes": 1})], "disk was the limit: busy 60 % of 10.0 s"),
        ([("read", 0, 1, {"bytes": 1}), ("statistics", 1, 8, {})], "compute was the limit: busy 70 % of 10.0 s"),
        ([("copy", 0, 3, {"bytes": 3}), ("copy", 2, 5, {"bytes": 3})], "bus was the limit: busy 50 % of 10.0 s"),
    ],
)
def test_the_limit_is_what_was_busy_longest(tmp_path, monkeypatch, spans, said):
    (tmp_path / "first").write_bytes(bytes(1000))
    trace = Trace(begun=0.0, spans=[Span("", kind, begin, end, 0, args) for kind, begin, end, args in spans])
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0)
    line = trace.limit(tmp_path / "first", "cpu")
    assert said in line
    if "disk" in said:
        assert "bytes went at 2 GB/s, a first block was read once more at" in line


def test_covered():
    assert covered([]) == 0
    assert covered([(3, 4), (0, 2), (1, 2.5), (1, 1.5)]) == 3.5
