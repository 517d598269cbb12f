"""Two processes that share the samples find what one finds."""

import os
import socket
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from oracles import make, texts

from curvkern.curvature import CurvatureError, Statistics, estimate
from curvkern.curvature.ranks import Ranks, joined
from curvkern.curvature.texts import batches
from curvkern.measure import measure

LENGTHS = (7, 12, 3, 9, 5, 11, 4)
ASKED = {
    "sums": {"quantity": ["gradient", "fisher_diag", "sample_norms", "low_rank"], "kinds": ("linear", "norm")},
    "ekfac": {"quantity": ["kfac", "ekfac"]},
    "drawn": {"fisher_type": "mc", "mc_samples": 3, "seed": 5},
    "hessian": {"quantity": ["gradient", "hessian_diag"], "probes": 2},
    "batch": {"sample": "batch"},
    "experts": {"quantity": ["fisher_diag", "kfac"], "kinds": ("linear", "experts")},
}
CHOICES = {"batch_tokens": 14}


def found_by(name, **options):
    return estimate(
        make("mixtral" if name == "experts" else "llama"), texts(LENGTHS), **CHOICES, **ASKED[name], **options
    )


def broken_on_last(logits, labels):
    """NaN where the last sample is."""
    longest = labels.shape[1]
    losses = logits.logsumexp(-1).mean(1)
    return losses * float("nan") if longest == LENGTHS[-2] else losses


def message(call, *arguments, **options):
    with pytest.raises(CurvatureError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in ASKED:
        found_by(name).save(folder / f"{name}{rank}")
    model, rows = make("llama"), texts(LENGTHS)
    first = Statistics.load(folder / "first")
    estimate(model, rows, **CHOICES, resume=first).save(folder / f"resumed{rank}")
    estimate(model, rows, **CHOICES, loss=broken_on_last, non_finite="skip").save(folder / f"skipped{rank}")
    told = []
    estimate(model, rows, **CHOICES, tell=lambda done, total: told.append((done, total)))
    assert told == [] if rank else told[-1] == (7, 7)
    torch.save(
        [
            message(estimate, model, rows, **CHOICES, loss=broken_on_last),
            message(estimate, model, rows, **CHOICES, stop=lambda: False),
            message(estimate, model, rows),
            message(estimate, model, rows[rank:], **CHOICES),
            message(estimate, model, rows, **CHOICES, seed=rank),
        ],
        folder / f"messages{rank}",
    )
    dist.destroy_process_group()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both ranks found, each in files of its own."""
    folder = tmp_path_factory.mktemp("ranks")
    first = texts(LENGTHS)[:3]
    estimate(make("llama"), first, **CHOICES).save(folder / "first")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(work, (free_port(), folder), nprocs=2)
    return folder


def require_equal(got, alone):
    assert got.choices == alone.choices
    assert got.counts == alone.counts
    assert {q: set(of) for q, of in got.sums.items()} == {q: set(of) for q, of in alone.sums.items()}
    for quantity, of in alone.sums.items():
        for name, tensor in of.items():
            size = float(tensor.abs().max())
            torch.testing.assert_close(
                got[quantity][name], tensor, rtol=1e-5, atol=1e-5 * size, msg=f"{quantity}/{name}"
            )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [name for name in ASKED if name != "ekfac"])
def test_each_rank_has_the_statistics_of_all_data(folder, name, rank):
    got, alone = Statistics.load(folder / f"{name}{rank}"), found_by(name)
    require_equal(got, alone)
    for quantity in {"sample_norms", "low_rank"} & set(alone.sums):
        assert all(len(of) == len(LENGTHS) for of in got[quantity].values())


def test_ekfac_is_in_a_basis_that_all_ranks_share(folder):
    """Eigenvectors may differ where Grams differ by rounding; what they say of the Fisher may not."""
    one, other, alone = Statistics.load(folder / "ekfac0"), Statistics.load(folder / "ekfac1"), found_by("ekfac")
    for name, squares in alone["ekfac"].items():
        for basis in ("input_basis", "output_basis"):
            assert torch.equal(one[basis][name], other[basis][name])
            gram = alone[basis.replace("basis", "gram")][name]
            vectors = one[basis][name]
            values = torch.diagonal(vectors.T @ gram @ vectors)
            torch.testing.assert_close(
                vectors @ values.diag() @ vectors.T, gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max())
            )
        assert torch.equal(one["ekfac"][name], other["ekfac"][name])
        torch.testing.assert_close(one["ekfac"][name].sum(), squares.sum(), rtol=1e-5, atol=0)


def test_modules_with_the_same_inputs_share_a_gram_still(folder):
    grams = Statistics.load(folder / "ekfac1")["input_gram"]
    shared, alone = len({of.data_ptr() for of in grams.values()}), found_by("ekfac")["input_gram"]
    assert shared == len({of.data_ptr() for of in alone.values()}) < len(grams)


def test_resumed_and_skipped(folder):
    rows, model = texts(LENGTHS), make("llama")
    whole = estimate(model, rows, **CHOICES, resume=Statistics.load(folder / "first"))
    skipped = estimate(model, rows, **CHOICES, loss=broken_on_last, non_finite="skip")
    assert skipped.counts.samples < skipped.counts.rows == len(rows)
    for rank in (0, 1):
        require_equal(Statistics.load(folder / f"resumed{rank}"), whole)
        require_equal(Statistics.load(folder / f"skipped{rank}"), skipped)


def test_errors_reach_every_rank(folder):
    for rank in (0, 1):
        broken, stop, few, data, seed = torch.load(folder / f"messages{rank}")
        assert ("rank 1: " in broken) == (rank == 0)
        assert "finite" in broken
        assert "stop is for one process; here are 2 ranks" in stop
        assert "7 rows are 1 batches of 4096 tokens, too few for 2 ranks; pass a smaller batch_tokens" in few
        assert "data is " in data
        assert "of which each does its share" in data
        assert "seed=0" in seed
        assert "seed=1" in seed


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_are_runs_of_whole_batches(count):
    rows = texts(LENGTHS)
    starts = [batch.first for batch in batches(rows, 14, "cpu", 1)]
    shares = []
    for rank in range(count):
        ranks = Ranks()
        ranks.rank, ranks.count = rank, count
        shares.append(ranks.share(rows, 1, 14))
    assert shares[0][0] == 1
    assert shares[-1][1] == len(rows)
    assert all(a[1] == b[0] for a, b in pairwise(shares))
    assert all(start in starts and start < end for start, end in shares)


def test_alone_there_is_no_group():
    with joined():
        assert not dist.is_initialized()
        assert (Ranks().rank, Ranks().count, Ranks().device("cuda")) == (0, 1, "cuda")


def test_two_ranks_from_the_command_line(family, tmp_path):
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
        "-m", "curvkern", "curvature", family / "aligned", "--data", family / "task.jsonl", "--out", tmp_path / "two",
        "--batch-tokens", "8",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fisher_diag of 6 rows") == 2  # each rank tells, one writes
    assert done.stderr.count("memory needed") == 1
    one = measure(family / "aligned", family / "task.jsonl", tmp_path / "one", batch_tokens=8)
    require_equal(Statistics.load(tmp_path / "two"), one)
