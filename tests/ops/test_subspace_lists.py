"""alignment_map and alignment_scores of lists: each module as if it came alone, modules of one shape in one launch."""

import pytest
import torch

from curvkern import explain
from curvkern.ops import alignment_map, alignment_scores

SHAPES = [(40, 30, 3), (20, 50, 2), (40, 30, 3), (40, 30, 4), (0, 5, 2), (40, 30, 3)]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    return request.param


def modules(device, shapes=SHAPES, dtypes=(torch.float32, torch.bfloat16)):
    """(B, A, aligned, base) lists; dtypes of the weights alternate."""
    torch.manual_seed(0)
    rows = []
    for at, (o, i, r) in enumerate(shapes):
        dtype = dtypes[at // 2 % len(dtypes)]
        aligned = torch.randn(o, i)
        base = aligned + 0.1 * torch.randn(o, i)
        rows.append((torch.randn(o, r), torch.randn(r, i), aligned.to(dtype), base.to(dtype)))
    return tuple([t.to(device) for t in column] for column in zip(*rows, strict=True))


def test_lists_give_what_each_module_gives(backend, device):
    B, A, aligned, base = modules(device)
    ys, norms = alignment_map(B, aligned, base, backend=backend)
    scores = alignment_scores(B, A, aligned, base, backend=backend)
    assert [y.shape for y in ys] == [b.shape for b in B]
    for at, module in enumerate(zip(B, A, aligned, base, strict=True)):
        y, norm = alignment_map(module[0], *module[2:], backend=backend)
        torch.testing.assert_close((ys[at], norms[at]), (y, norm))
        alone = alignment_scores(*module, backend=backend)
        torch.testing.assert_close(torch.stack(alone), torch.stack([score[at] for score in scores]))


def test_the_same_bits_twice(backend, device):
    B, _, aligned, base = modules(device)
    first, second = (alignment_map(B, aligned, base, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], first[1]), (*second[0], second[1]), strict=True))


def test_addresses_that_are_no_multiple_of_16_go_alone(backend, device):
    B, _, aligned, base = modules(device, [(16, 8, 2)] * 3, (torch.bfloat16,))
    shifted = torch.empty(16 * 8 + 1, dtype=torch.bfloat16, device=device)[1:].view(16, 8).copy_(aligned[1])
    expected = alignment_map(B, aligned, base, backend=backend)[0]
    got = alignment_map(B, [aligned[0], shifted, aligned[2]], base, backend=backend)[0]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_in_nothing_out(backend):
    assert alignment_map([], [], [], backend=backend)[0] == []
    assert [len(score) for score in alignment_scores([], [], [], [], backend=backend)] == [0, 0, 0]


def test_compiled_and_opcheck(backend, device):
    B, _, aligned, base = modules(device, SHAPES[:3])
    step = torch.compile(lambda *lists: alignment_map(*lists, backend=backend), fullgraph=True, backend="aot_eager")
    got, expected = step(B, aligned, base), alignment_map(B, aligned, base, backend=backend)
    torch.testing.assert_close((*got[0], got[1]), (*expected[0], expected[1]))
    if backend == "reference":
        torch.library.opcheck(torch.ops.curvkern.alignment_maps.default, (B, aligned, base, backend))


def test_explained(device):
    B, _, aligned, base = modules(device)
    assert [choice.backend for choice in explain(alignment_map, B, aligned, base)] == ["triton", "reference"]


def test_bad_lists_are_named(device):
    B, A, aligned, base = modules(device, SHAPES[:3])
    with pytest.raises(ValueError, match="alignment_map: base is a list of 2; wanted a list of 3, as x is"):
        alignment_map(B, aligned, base[:2])
    with pytest.raises(ValueError, match="alignment_scores: A is a tensor; wanted a list of 3"):
        alignment_scores(B, A[0], aligned, base)
    with pytest.raises(ValueError, match=r"alignment_map: .*\(module 1 of the list\)"):
        alignment_map([B[0], B[0], B[2]], aligned, base)
    B[2].requires_grad_()
    with pytest.raises(RuntimeError, match="x requires grad"):
        alignment_map(B, aligned, base)
