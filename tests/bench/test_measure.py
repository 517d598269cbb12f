"""What is measured, and how: the gate, the copies, the turns, the providers."""

import time
from dataclasses import replace

import pytest
import torch

import curvkern
from curvkern.bench import providers as who
from curvkern.bench.cases import CASES
from curvkern.bench.clock import Copies, extra_memory, host_seconds, interleave, tensors_in
from curvkern.bench.gate import Gate
from curvkern.bench.machine import Machine
from curvkern.bench.passes import measure_passes
from curvkern.bench.providers import Provider
from curvkern.bench.results import Row
from curvkern.bench.run import measure_case, smallest

CPU = torch.device("cpu")
MACHINE = Machine("Chip (R) CPU @ 2 GHz", "cpu", "2 cores", "torch 0", "abc", 1 << 16, 1e10, 1e11, 2e11)
ALL = [case for cases in CASES.values() for case in cases]
SMALL = list({case.function: smallest(case) for case in ALL}.values())


def case_of(function):
    return next(case for case in SMALL if case.function == function)


def wrong(*args, **kwargs):
    """A kernel that does nothing."""


# cases ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in ALL if case.size != "edge"], ids=str)
def test_measured_cases_declare_their_work(case):
    assert case.bytes > 0
    assert (case.flops > 0) == (
        case.op in ("fisher", "subspace", "obs") or case.function == "gram_" or "lm_head" in case.label
    )


def test_no_two_cases_share_a_name():
    assert len({str(case) for case in ALL}) == len(ALL)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_function_has_a_case_that_only_costs_the_host(case):
    assert case.bytes <= 4096


def test_declared_bytes_are_at_least_those_of_the_inputs():
    for case in ALL:
        if case.size == "tiny" or (case.size == "s" and case.op == "rollback"):
            arguments = case.make("cpu")
            assert case.bytes >= sum(t.nbytes for t in tensors_in(arguments))


# the gate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["blend_", "rollback_", "score_histogram_", "fisher_diag_", "alignment_map"])
def test_a_wrong_kernel_gets_no_number(function):
    case = replace(case_of(function), bytes=1)
    if function in ("rollback_", "score_histogram_"):
        case = next(c for c in CASES[case.op] if c.function == function and c.label == "33x65")
    arguments = case.make("cpu")
    right = Provider("reference", getattr(curvkern, function), "ours")
    rows = measure_case(case, arguments, [right, Provider("broken", wrong, "ours")], MACHINE, 0)
    assert [(row.provider, row.status) for row in rows] == [("reference", "ok"), ("broken", "wrong")]
    assert rows[0].median > 0
    assert (rows[1].median, rows[1].p20, rows[1].host, rows[1].extra) == (None, None, None, None)


def test_a_kernel_of_ours_must_be_as_exact_as_torch_and_a_peer_as_its_dtype():
    case = next(c for c in CASES["fisher"] if c.label == "n3 t5 17x33" and c.dtype == torch.bfloat16)
    arguments = case.make("cpu")

    def rounded(fisher, d, x):
        return fisher.copy_(curvkern.fisher_diag_(fisher, d, x).bfloat16())

    blank = Row("fisher_diag_", "bfloat16", "", "", "ours")
    gate = Gate(case, arguments)
    assert gate.judge(Provider("", rounded, "ours"), blank).status == "wrong"
    assert gate.judge(Provider("", rounded, "peer"), blank).status == "ok"
    assert gate.judge(Provider("", wrong, "peer"), blank).status == "wrong"
    for kind in ("bound", "random"):
        assert gate.judge(Provider("", wrong, kind), blank).status == "ok"
    nan = Provider("", lambda fisher, d, x: fisher.fill_(float("nan")), "peer")
    assert gate.judge(nan, blank).status == "wrong"


def test_a_provider_that_fails_says_why():
    case = case_of("blend_")

    def no_compiler(*args):
        raise RuntimeError("no C++ compiler\nand much more")

    gate = Gate(case, case.make("cpu"))
    peer = gate.judge(Provider("compile", no_compiler), Row("", "", "", "", "peer"))
    ours = gate.judge(Provider("cpu", no_compiler, "ours"), Row("", "", "", "", "ours"))
    assert (peer.status, peer.note) == ("n/a", "RuntimeError: no C++ compiler")
    assert ours.status == "wrong"


# the clock ------------------------------------------------------------------------------------------------------------


def test_providers_take_turns():
    order, now = [], [0.0]

    def provider(name):
        def sample():
            order.append(name)
            now[0] += 1.0
            return 0.5

        return sample

    found = interleave({name: provider(name) for name in "abc"}, 4.0, rounds=5, clock=lambda: now[0])
    assert "".join(order) == "abc" + 5 * "abc"  # a warm-up of a second each, then rounds
    assert found == {name: 5 * [0.5] for name in "abc"}


def test_warming_up_goes_by_time_and_rounds_go_on_until_the_time_is_over():
    now = [0.0]
    calls = []

    def sample():
        now[0] += 0.1
        calls.append(now[0])
        return 0.1

    found = interleave({"a": sample}, 4.0, rounds=5, clock=lambda: now[0])
    assert 10 <= len(calls) - len(found["a"]) <= 11
    assert 39 <= len(found["a"]) <= 41


def test_copies_fill_more_than_the_cache_and_edits_are_undone():
    clean = (torch.ones(100), 2.0), {"lists": [torch.arange(10)]}
    copies = Copies(clean, 10_000)
    size = 100 * 4 + 10 * 8
    assert len(copies.all) * size > 10_000
    seen = []
    for _ in range(2 * len(copies.all)):
        args, kwargs = copies.next()
        assert torch.equal(args[0], clean[0][0])
        assert torch.equal(kwargs["lists"][0], clean[1]["lists"][0])
        args[0].zero_()
        kwargs["lists"][0].add_(1)
        seen.append(args[0].data_ptr())
    assert len(set(seen)) == len(copies.all)
    assert seen[: len(copies.all)] == seen[len(copies.all) :]
    assert torch.equal(clean[0][0], torch.ones(100))


def test_extra_memory_sees_what_a_call_holds():
    def call(x):
        held = x.repeat(64)
        return held[:1].clone()

    found = extra_memory(call, ((torch.ones(1 << 18),), {}), CPU)
    if found is None:
        pytest.skip("this system does not tell resident memory")
    assert 60 << 20 < found < 80 << 20


def test_host_time_is_that_of_a_call():
    assert 1e-3 < host_seconds(lambda: time.sleep(1e-3), ((), {}), CPU) < 2e-2


# providers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_reference_can_be_traced_for_the_compiler(case, monkeypatch):
    """What torch.compile gets computes what the reference computes, on any numbers."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: compiled.append(graph) or graph)
    arguments = case.make("cpu")
    provider = who._compiled(case, arguments)
    assert Gate(case, arguments).judge(provider, Row("", "", "", "", "peer")).status == "ok"
    assert not [n for n in compiled[0].graph.nodes if "curvkern" in str(n.target)], "opaque to the compiler"


@pytest.mark.parametrize("options", ["plain", "weight_grad", "experts"])
def test_other_ways_to_the_fisher_diagonal_are_right(options):
    d, x = torch.randn(6, 4, 8), torch.randn(6, 4, 5)
    kwargs = {"plain": {}, "weight_grad": {"weight_grad": torch.zeros(8, 5)}}.get(options)
    if kwargs is None:
        cuts = torch.tensor([0, 3, 3, 10, 24])
        kwargs = {"cu_seqlens": cuts, "segments": cuts[::2].clone()}
        d, x = d.flatten(0, 1), x.flatten(0, 1)
    fisher = torch.zeros(2, 8, 5) if options == "experts" else torch.zeros(8, 5)
    case = case_of("fisher_diag_")
    gate = Gate(case, ((fisher, d, x), kwargs))
    found = [p for p in who._fisher("fisher_diag_", kwargs) if p.kind == "peer"]
    for provider in found:
        row = gate.judge(provider, Row("", "", "", provider.name, "peer"))
        assert (provider.name, row.status, row.note) == (provider.name, "ok", "")
    assert {"GEMM loop", "vmap(grad)"} - {p.name for p in found} == (set() if options == "plain" else {"vmap(grad)"})


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(who.importlib.util, "find_spec", lambda module: None if module == "opacus" else object())
    assert who.missing_peers() == ["opacus"]


def test_backends_that_belong_to_another_device_are_no_rows():
    case = case_of("rollback_")
    names = [p.name for p in who.providers(case, case.make("cpu"), CPU, "auto", False)]
    assert names == ["reference", "cpu"]
    assert [p.name for p in who.providers(case, case.make("cpu"), CPU, "reference", True)] == ["reference", "compile"]


# the pass -------------------------------------------------------------------------------------------------------------


def test_the_pass_is_measured_against_the_disk():
    rows = next(iter(measure_passes(MACHINE, "tiny", 0)))
    assert [(row.provider, row.kind, row.status) for row in rows] == [
        ("curvkern", "ours", "ok"),
        ("read + write", "bound", "ok"),
    ]
    assert rows[0].error == 0
    assert rows[1].percent == pytest.approx(100)
    assert rows[0].percent == pytest.approx(100 * rows[1].median / rows[0].median)


def test_a_pass_of_no_such_size():
    with pytest.raises(ValueError, match=r"no pass of size 'huge'; there are tiny, s, m, l"):
        next(measure_passes(MACHINE, "huge", 0))
