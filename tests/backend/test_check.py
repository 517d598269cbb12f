"""Messages of argument errors: op, argument, what came, what was wanted, what to do."""

import pytest
import torch

from curvkern.backend import check

F32, F16 = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16)
META = torch.zeros(2, 3, device="meta")
GRAD = torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (
            TypeError,
            "op: x has dtype float16; wanted float32, bfloat16. Cast it: x.to(torch.float32).",
            lambda: check.dtype("op", "x", F16, (torch.float32, torch.bfloat16)),
        ),
        (
            TypeError,
            "op: x has dtype float16; wanted uint8. Pass bits.",
            lambda: check.dtype("op", "x", F16, (torch.uint8,), "Pass bits."),
        ),
        (
            TypeError,
            "op: y has dtype float16 but x has float32; they must agree. Cast one of them.",
            lambda: check.same_dtype("op", x=F32, none=None, y=F16),
        ),
        (
            ValueError,
            "op: y has shape [3] but x has [2, 3]; they must agree.",
            lambda: check.same_shape("op", x=F32, y=torch.zeros(3)),
        ),
        (
            ValueError,
            "op: x has shape [2, 3]; wanted [3, 2] (one number per tile).",
            lambda: check.shape("op", "x", F32, (3, 2), "one number per tile"),
        ),
        (
            ValueError,
            "op: y is on meta but x is on cpu; move one of them: y.to('cpu').",
            lambda: check.same_device("op", x=F32, y=META),
        ),
        (
            RuntimeError,
            "op: x requires grad, but op has no derivative. Pass x.detach(), or call it under torch.no_grad().",
            lambda: check.no_grad("op", x=GRAD),
        ),
        (
            ValueError,
            "op: rule is 'tailor'; wanted one of 'grad', 'taylor'. Did you mean 'taylor'?",
            lambda: check.one_of("op", "rule", "tailor", ("grad", "taylor")),
        ),
        (
            ValueError,
            "op: rule is 'zzz'; wanted one of 'grad', 'taylor'.",
            lambda: check.one_of("op", "rule", "zzz", ("grad", "taylor")),
        ),
        (
            ValueError,
            "op: fisher is missing; rule 'gain' needs it. Pass fisher=...",
            lambda: check.needed("op", "rule 'gain'", grad=F32, fisher=None),
        ),
        (ValueError, "op: k is -1; wanted at least 0.", lambda: check.at_least("op", "k", -1, 0)),
    ],
)
def test_messages(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_what_fits_passes_in_silence():
    check.dtype("op", "x", F32, check.FLOATS)
    check.dtype("op", "x", None, check.FLOATS)
    check.same_dtype("op", x=None, y=F16, z=F16)
    check.same_shape("op", x=F32, y=F16, z=None)
    check.shape("op", "x", F32, (2, 3), "rows and columns")
    check.same_device("op", x=F32, y=F16, z=None)
    check.one_of("op", "rule", "grad", ("grad",))
    check.needed("op", "a rule", grad=F32)
    check.at_least("op", "k", 0, 0)
    with torch.no_grad():
        check.no_grad("op", x=GRAD)
