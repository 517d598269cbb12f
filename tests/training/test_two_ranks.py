"""A penalty's gradient beside DistributedDataParallel; what the ranks import is kept small."""

import torch
from torch import nn

from curvkern.training import AsFT


def two_ranks(rank, path):
    """One step on half of the data: the penalty's backward, then that of the loss through DDP."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model, asft, data = linear()
    parallel = nn.parallel.DistributedDataParallel(model)
    asft.penalty(parallel).backward()
    parallel(data[rank::2]).square().mean().backward()
    torch.testing.assert_close(model[0].weight.grad, on_one_rank(), rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()


def linear():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 5)), torch.randn(8, 6)
    return model, AsFT({"0": (torch.randn(5, 6), torch.randn(5, 6))}), data


def on_one_rank():
    model, asft, data = linear()
    (asft.penalty(model) + model(data).square().mean()).backward()
    return model[0].weight.grad


def test_two_ranks_step_as_one_does(tmp_path):
    torch.multiprocessing.spawn(two_ranks, (tmp_path / "meeting",), nprocs=2)
