"""Memory for reads comes back by itself; what is written goes to the disk meanwhile."""

import errno
import gc
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from curvkern.checkpoint import Checkpoint, CheckpointError, Writer
from curvkern.checkpoint.buffers import Buffers
from curvkern.checkpoint.flush import Flush

MIB = 1 << 20


def test_memory_of_a_tensor_that_is_gone_serves_the_next():
    buffers = Buffers()
    first = buffers.take(8 * MIB)
    place, view = first.data_ptr(), first.view(torch.float32)[5:9]
    del first
    assert buffers.free == 0  # the view holds it
    assert buffers.take(8 * MIB).data_ptr() != place
    del view
    gc.collect()
    assert buffers.free == 16 * MIB
    both = [buffers.take(7 * MIB), buffers.take(8 * MIB)]
    assert place in [tensor.data_ptr() for tensor in both]
    assert [len(tensor) for tensor in both] == [7 * MIB, 8 * MIB]
    assert buffers.free == 0


def test_two_tensors_never_share_memory():
    buffers = Buffers()
    held = [buffers.take(2 * MIB + k).fill_(k) for k in range(8)]
    assert all(bool((tensor == k).all()) for k, tensor in enumerate(held))


def test_not_more_than_so_much_waits():
    buffers = Buffers(most_free=10 * MIB)
    held = [buffers.take(4 * MIB) for _ in range(5)]
    held.clear()
    assert buffers.free == 8 * MIB


def test_a_much_larger_area_is_not_taken_for_a_small_tensor():
    buffers = Buffers()
    buffers.take(64 * MIB)
    buffers.take(8 * MIB)
    assert buffers.free == 72 * MIB


def test_threads_get_areas_of_their_own():
    buffers, wrong = Buffers(), []

    def work(k):
        for _ in range(200):
            tensor = buffers.take(2 * MIB)
            tensor[:4096] = k
            if not bool((tensor[:4096] == k).all()):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reads_of_a_checkpoint_stay_what_they_were(tmp_path):
    """Also those of earlier reads, while later ones come and go."""
    tensors = {f"t{k}": torch.full((3 * MIB,), k, dtype=torch.int32) for k in range(4)}
    save_file(tensors, tmp_path / "m.safetensors")
    with Checkpoint.open(tmp_path / "m.safetensors") as checkpoint:
        first = checkpoint.read("t0")
        for _ in range(2):
            assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(first, tensors["t0"])


def test_flushes_run_beside_the_caller_and_one_at_a_time(monkeypatch):
    flushed, go = [], threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda fd: (go.wait(5), flushed.append((fd, threading.current_thread().name))))
    flush = Flush(at_once=100)
    flush.wrote(7, 99)
    assert flush._thread is None
    for _ in range(5):
        flush.wrote(7, 100)  # does not wait
    assert flushed == []
    go.set()
    flush.wait()
    assert flushed == [(7, "curvkern-flush")]


@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
def test_what_fails_beside_the_caller_is_told_and_nothing_is_lost(save, tmp_path, monkeypatch, call):
    source = save()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Flush.__init__, "__defaults__", (1,))
    with Checkpoint.open(source) as checkpoint:

        def begin():
            with Writer(tmp_path / "out", checkpoint, resume=True) as writer, monkeypatch.context() as patched:
                patched.setattr(os, call, full)
                writer.copy_rest()

        with pytest.raises(CheckpointError, match=r"the disk is full, while .*safetensors; nothing there was changed"):
            begin()
        assert not (tmp_path / "out").exists()
        with Writer(tmp_path / "out", checkpoint, resume=True) as writer:
            writer.copy_rest()
            writer.finish()
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
