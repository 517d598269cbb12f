"""Guards beside DistributedDataParallel: two ranks step as one process does; what the ranks import is kept small."""

import torch
from torch import nn

from curvkern.training import AsFT, Booster, ProximalStep, WeightEMA


def stepped(model, data):
    """Gradients of a second step with four guards, and the average after it."""
    torch.manual_seed(1)
    asft = AsFT({"0": (torch.randn(5, 6), torch.randn(5, 6))})
    average, proximal = WeightEMA(0.5).attach(model), ProximalStep().attach(model)
    booster = Booster([{"x": data}], loss=lambda model, batch: model(batch["x"]).sin().mean()).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        proximal.begin_step()
        asft.penalty(model).backward()
        model(data).square().mean().backward()
        booster.add_gradient_()
        proximal.add_gradient_()
        optimizer.step()
        average.update()
    return [p.grad for p in model.parameters()], average.averages()


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)), torch.randn(8, 6)


def two_ranks(rank, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model, data = linear()
    found = stepped(nn.parallel.DistributedDataParallel(model), data[rank::2])
    torch.testing.assert_close(found, torch.load(f"{path}.one"), rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()


def test_two_ranks_step_as_one_does(tmp_path):
    torch.save(stepped(*linear()), tmp_path / "meeting.one")
    torch.multiprocessing.spawn(two_ranks, (tmp_path / "meeting",), nprocs=2)
