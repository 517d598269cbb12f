"""Both ends of methods that reset weights: nothing leaves the tuned model's bits, everything is the aligned one's."""

import pytest
import torch
from modules import as_dtype, made_module

from curvkern.methods import make

ENDS = [
    ("random", {"fraction": 0.0}, {"fraction": 1.0}),
    ("antidote", {"fraction": 0.0}, {"fraction": 1.0}),
    ("rewind", {"safety_fraction": 0.0}, {"safety_fraction": 1.0, "task_fraction": 0.0}),
    ("rewind", {"by": "wanda", "task_fraction": 1.0}, {"by": "wanda", "safety_fraction": 1.0, "task_fraction": 0.0}),
    ("splora", {"number": 0}, {"number": 1}),
    ("safe_delta", None, {"budget": 0.0}),
    ("safe_delta", None, {"dropped": 1.0}),
    ("merge", {"weight": 0.0}, {"weight": 1.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, nothing, everything", ENDS)
def test_nothing_is_the_tuned_model_and_everything_the_aligned_one(name, nothing, everything, dtype):
    for parameters, end in ((nothing, "tuned"), (everything, "aligned")):
        if parameters is None:
            continue
        method = make(name, parameters)
        m = as_dtype(made_module(method, base=torch.zeros(24, 16), safety_adapter=torch.zeros(24, 16)), dtype)
        edit = method.edit(m, method.plan(lambda m=m: [m], None, lambda line: None))
        got = m.tuned if edit.weight is None else edit.weight.to(dtype)
        assert torch.equal(got, getattr(m, end))
