"""Which backend a call takes, and what is said when it cannot."""

import logging
import threading

import pytest
import torch

import curvkern
from curvkern.backend import dispatch
from curvkern.backend.dispatch import BackendError, Route, lazily

X, CPU = torch.zeros(3), torch.device("cpu")


def route(backend, refusal=None):
    return Route(backend, lambda *_: backend, lambda *_: refusal)


# Names that `dispatch` knows nothing of can always run; so "cpu" can in a test of order.
ROUTES = (route("fast", "x is odd"), route("better"), route("reference"))


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch):
    monkeypatch.delenv("CURVKERN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "fast", "better"))
    monkeypatch.setattr(dispatch, "_told", set())


def test_auto_takes_the_first_that_can():
    assert dispatch.run("op", ROUTES, "auto", (X,), CPU) == "better"
    assert dispatch.run("op", ROUTES[1:], "auto", (X,), CPU) == "better"
    assert dispatch.run("op", ROUTES[2:], "auto", (X,), CPU) == "reference"


def test_refusals_see_the_arguments():
    odd = Route("fast", lambda x: "fast", lambda x: "x is odd" if x.numel() % 2 else None)
    assert dispatch.run("op", (odd, ROUTES[2]), "auto", (torch.zeros(3),), CPU) == "reference"
    assert dispatch.run("op", (odd, ROUTES[2]), "auto", (torch.zeros(4),), CPU) == "fast"


def test_argument_beats_block_beats_environment(monkeypatch):
    monkeypatch.setenv("CURVKERN_BACKEND", "reference")
    assert dispatch.run("op", ROUTES, "auto", (X,), CPU) == "reference"
    with curvkern.use("better"):
        assert dispatch.run("op", ROUTES, "auto", (X,), CPU) == "better"
        assert dispatch.run("op", ROUTES, "reference", (X,), CPU) == "reference"
        with curvkern.use("auto"):
            assert dispatch.requested("op", "auto") == "auto"
        assert dispatch.requested("op", "auto") == "better"
    assert dispatch.requested("op", "auto") == "reference"


def test_a_block_ends_with_an_exception_too():
    with pytest.raises(KeyError), curvkern.use("reference"):
        raise KeyError
    assert dispatch.requested("op", "auto") == "auto"


def test_a_block_is_of_its_own_thread():
    seen = []
    with curvkern.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested("op", "auto")))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("how", ["argument", "block", "environment"])
def test_what_was_asked_for_runs_or_raises_with_the_reason(monkeypatch, how):
    def call():
        if how == "block":
            with curvkern.use("fast"):
                return dispatch.run("op", ROUTES, "auto", (X,), CPU)
        if how == "environment":
            monkeypatch.setenv("CURVKERN_BACKEND", "fast")
        return dispatch.run("op", ROUTES, "fast" if how == "argument" else "auto", (X,), CPU)

    with pytest.raises(BackendError, match=r"^op: backend 'fast' cannot run this call: x is odd$"):
        call()


def test_a_version_that_does_not_exist():
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot run.*op has no such version; it has better, refer"):
        dispatch.run("op", ROUTES[1:], "cuda", (X,), CPU)


def test_unknown_names_suggest_the_nearest(monkeypatch):
    with pytest.raises(ValueError, match=r"^op: backend is 'cdua'; wanted one of .* Did you mean 'cuda'"):
        dispatch.run("op", ROUTES, "cdua", (X,), CPU)
    with pytest.raises(ValueError, match=r"^use: backend is 'tritn'.*Did you mean 'triton'"), curvkern.use("tritn"):
        pass
    monkeypatch.setenv("CURVKERN_BACKEND", "refrence")
    with pytest.raises(ValueError, match=r"CURVKERN_BACKEND is 'refrence'.*Did you mean 'reference'"):
        dispatch.run("op", ROUTES, "auto", (X,), CPU)


def test_falling_back_is_logged_once_per_op_and_reason(caplog):
    with caplog.at_level(logging.INFO, "curvkern"):
        for _ in range(3):
            dispatch.run("op", ROUTES, "auto", (X,), CPU)
        dispatch.run("other", ROUTES, "auto", (X,), CPU)
    assert [record.getMessage() for record in caplog.records] == ["op: not fast: x is odd", "other: not fast: x is odd"]


def test_a_lazy_route_imports_at_its_first_call(monkeypatch):
    wanted = []
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: wanted.append(name) or torch)
    zeros = lazily("some.kernels:zeros")
    assert not wanted
    assert zeros(3).shape == (3,)
    assert wanted == ["some.kernels"]


# what a machine has ---------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_triton_on_a_cpu_is_an_interpreter_and_never_taken_by_itself(monkeypatch):
    routes = (route("triton"), route("reference"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.backend_missing("triton", CPU) is None
    assert dispatch.run("op", routes, "auto", (X,), CPU) == "reference"
    assert dispatch.run("op", routes, "triton", (X,), CPU) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"runs only as an interpreter \(TRITON_INTERPRET=1\)"):
        dispatch.run("op", routes, "triton", (X,), CPU)


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: False)
    assert dispatch.backend_missing("triton", GPU) == "triton is not installed (pip install 'curvkern[triton]')"


def test_cpu_kernels_take_cpu_tensors():
    assert dispatch.backend_missing("cpu", GPU) == "the tensors are on cuda:0"
    assert dispatch.backend_missing("reference", GPU) is None


# explain --------------------------------------------------------------------------------------------------------------


def arguments():
    return torch.zeros(9), torch.ones(9), 0.5


def test_explain_says_what_a_call_would_take_and_runs_nothing():
    weight, target, alpha = arguments()
    choices = curvkern.explain(curvkern.blend_, weight, target, alpha)
    assert [choice.backend for choice in choices] == ["cuda", "cpu", "triton", "reference"]
    assert [choice.chosen for choice in choices].count(True) == 1
    assert choices[0].reason == "the tensors are on cpu"
    assert choices[-1].usable
    assert (weight.sum(), weight._version) == (0, 0)


def test_explain_leaves_what_autograd_saved_usable():
    x = torch.ones(9, requires_grad=True)
    y = (x * x).detach().requires_grad_()
    loss = (y * y).sum()
    with torch.no_grad():
        curvkern.explain(curvkern.blend_, y, torch.zeros(9), 0.5)
    loss.backward()
    assert y.grad.tolist() == [2.0] * 9


def test_explain_agrees_with_what_is_asked_for():
    with curvkern.use("reference"):
        chosen = [choice for choice in curvkern.explain(curvkern.blend_, *arguments()) if choice.chosen]
    assert [choice.backend for choice in chosen] == ["reference"]
    refused = curvkern.explain(curvkern.blend_, *arguments(), backend="cuda")
    assert not any(choice.chosen for choice in refused)
    assert {choice.backend: choice.reason for choice in refused}["reference"] == "usable"


def test_explain_gives_the_op_s_own_reasons():
    weight = torch.zeros(9, dtype=torch.float64)
    choices = {c.backend: c for c in curvkern.explain(curvkern.blend_, weight, torch.ones_like(weight), 0.5)}
    assert choices["reference"].chosen
    if choices["cpu"].reason != "float64 runs on the reference only":
        assert "not there" in choices["cpu"].reason  # no native extension


def test_explain_checks_arguments_as_a_call_does_and_leaves_no_trace():
    with pytest.raises(ValueError, match="blend_: target has shape"):
        curvkern.explain(curvkern.blend_, torch.zeros(9), torch.ones(8), 0.5)
    with pytest.raises(TypeError, match=r"explain: .* reached no kernel; pass a function of curvkern.ops"):
        curvkern.explain(torch.add, X, X)
    weight, target, alpha = arguments()
    curvkern.blend_(weight, target, alpha)
    assert weight.sum() == 4.5
