"""Lists of plain CPU tensors go past torch's dispatcher: to the same bits, and only where nobody would miss it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvkern
from curvkern.backend import dispatch, launch
from curvkern.ops import vectors

pytestmark = pytest.mark.skipif(
    launch.pair_table([torch.zeros(2)], None) is None, reason="needs the native extension and torch 2.10"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lists():
    shapes = [(3, 5), (0, 4), (17,), (2, 1, 40000), (8, 8)]
    left = [torch.randn(shape) for shape in shapes]
    return left, [torch.randn(shape).to(DTYPES[k % 3]) for k, shape in enumerate(shapes)]


def calls(left, right):
    """All list ops, on copies: what they return and what they edit."""
    copies = [[tensor.clone() for tensor in left] for _ in range(3)]
    curvkern.axpby_list_(copies[0], 0.3, right, -1)
    curvkern.lerp_list_(copies[1], right, torch.tensor(0.25))
    found = [*curvkern.surgery_list_(copies[2], right, 0.5), curvkern.dot_list(left, right), curvkern.norm_list(right)]
    return [*found, *(tensor for copy in copies for tensor in copy)]


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_bits_are_those_of_the_registered_ops(monkeypatch):
    left, right = lists()
    with monkeypatch.context() as patch:
        for name in ("_list_sums", "_axpby_list", "_lerp_list"):
            patch.setattr(vectors, name, None)  # not called
        direct = calls(left, right)
    monkeypatch.setattr(vectors, "passes_by", lambda *_: False)
    for one, other in zip(direct, calls(left, right), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Made:
    """Tensors that are made when they are asked for."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, at):
        return self.tensors[at] * 2 + 1


def test_tensors_that_nobody_else_holds_live_as_long_as_the_call():
    left = [torch.randn(50000) for _ in range(8)]
    expected = [tensor * 2 + 1 for tensor in left]
    assert launch.pair_table(Made(left), None) is None
    curvkern.axpby_list_(left, 1.0, Made([tensor.clone() for tensor in left]), 0.0)
    assert all(torch.equal(one, other) for one, other in zip(left, expected, strict=True))


def test_zeros_without_memory_are_left_to_torch():
    assert launch.pair_table([torch._efficientzerotensor(8)], None) is None
    assert curvkern.norm_list([torch._efficientzerotensor(8)]) == 0


def test_a_list_edited_directly_bumps_versions():
    left, right = lists()
    versions = [tensor._version for tensor in left]
    curvkern.lerp_list_(left, right, 0.5)
    assert [tensor._version for tensor in left] == [version + 1 for version in versions]


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(4, 4, dtype=torch.float64),
        torch.zeros(4, 4, dtype=torch.int32),
        torch.zeros(4, 8)[:, ::2],
        torch.zeros(4, 4, requires_grad=True),
        torch.zeros(4, 4, device="meta"),
        torch.zeros(16),
    ],
    ids=["float64", "int32", "strided", "requires_grad", "meta", "shape"],
)
def test_what_is_not_plain_is_not_read(odd):
    plain = torch.zeros(4, 4)
    assert launch.pair_table([plain, odd], [plain, plain]) is None
    assert launch.pair_table([plain, plain], [plain, odd]) is None


def test_views_whose_sign_is_still_to_be_turned_are_left_to_torch():
    for view in (torch._neg_view(torch.ones(8)), torch.complex(torch.ones(1), torch.ones(1)).conj().imag):
        assert view.is_neg()
        assert launch.pair_table([view], None) is None
        edited = torch.zeros(len(view))
        curvkern.axpby_list_([edited], 1.0, [view], 0.0)
        assert torch.equal(edited, torch.full_like(edited, -1))


def test_subclasses_and_lists_of_two_lengths_are_not_read():
    class Own(torch.Tensor):
        pass

    plain = torch.zeros(3)
    assert launch.pair_table([plain.as_subclass(Own)], None) is None
    assert launch.pair_table([plain], [plain, plain]) is None
    assert launch.pair_table(["text"], None) is None


def test_parameters_are_read_where_no_gradient_is_recorded():
    parameter = nn.Parameter(torch.ones(3))
    assert launch.pair_table([parameter], None) is None
    with torch.no_grad():
        assert launch.pair_table([parameter], None).only_float32 is False  # of the other side, which is not there
        assert launch.pair_table([parameter], [parameter]).only_float32 is True


def test_a_shadow_of_few_bits_is_refused_as_ever():
    with pytest.raises(TypeError, match="keep the shadow in float32"):
        curvkern.lerp_list_([torch.zeros(3).half()], [torch.zeros(3)], 0.5)


def test_who_looks_on_sees_the_op():
    left, right = lists()
    with Log() as log:
        curvkern.lerp_list_(left, right, 0.5)
    assert "curvkern.lerp_list_.default" in log.seen
    assert [choice.backend for choice in curvkern.explain(curvkern.norm_list, left) if choice.chosen] == ["cpu"]


def test_another_backend_is_taken_if_asked_for(monkeypatch):
    assert dispatch.passes_by("op", "auto")
    assert dispatch.passes_by("op", "cpu")
    assert not dispatch.passes_by("op", "reference")
    with curvkern.use("reference"):
        assert not dispatch.passes_by("op", "auto")
    monkeypatch.setenv("CURVKERN_BACKEND", "reference")
    assert not dispatch.passes_by("op", "auto")


def test_inference_tensors_are_edited():
    with torch.inference_mode():
        shadow = [torch.zeros(4)]
        curvkern.lerp_list_(shadow, [torch.ones(4)], 0.5)
    assert shadow[0].tolist() == [0.5] * 4
