"""Philox words, signs and normal numbers: the published vectors, and the same bits in every language."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from curvkern.ops.philox import check_stream, normals_ref, philox_ref, philox_rounds, signs_ref

triton = pytest.importorskip("triton")
tl = triton.language
from curvkern.kernels.philox import normal_numbers, philox_words, sign_bits  # noqa: E402

ROOT = Path(__file__).parents[2]

# Random123's known answers for philox4x32-10: every bit of counter and key clear, and every bit set.
CLEAR = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
SET = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
STREAMS = [(0, 0), (5, 7), (-1, 2**40 + 3), (2**40 + 9, 2**32 - 8)]

RULES = """
#include "csrc/cpu/philox.h"
extern "C" int printf(const char*, ...);
int main() {
  using namespace curvkern;
  const Philox clear = philox4x32_10(0, 0), set = philox_rounds({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u);
  for (int k = 0; k < 4; ++k) printf("%08x ", clear.v[k]);
  for (int k = 0; k < 4; ++k) printf("%08x ", set.v[k]);
  alignas(64) uint32_t words[4][kIndices];
  philox_words(words, (uint64_t(1) << 32) - 8, kIndices, (uint64_t(3) << 40) + 9);
  for (int j = 0; j < kIndices; ++j)
    for (int k = 0; k < 4; ++k) printf("%08x ", words[k][j]);
}
"""
INSTRUCTIONS = {"generic": ("", ()), "avx2": ("avx2", ["-mavx2"]), "avx512": ("avx512f", ["-mavx512f", "-mavx2"])}


@triton.jit
def everything_kernel(words_ptr, normals_ptr, signs_ptr, seed, first):
    index = first + tl.arange(0, 16).to(tl.int64)
    a, b, c, d = philox_words(seed, index)
    at = words_ptr + tl.arange(0, 16) * 4
    tl.store(at, a.to(tl.int64))
    tl.store(at + 1, b.to(tl.int64))
    tl.store(at + 2, c.to(tl.int64))
    tl.store(at + 3, d.to(tl.int64))
    tl.store(normals_ptr + tl.arange(0, 64), normal_numbers(seed, index))
    tl.store(signs_ptr + tl.arange(0, 2048), 1.0 - 2.0 * sign_bits(seed, index).to(tl.float32))


def test_published_vectors():
    assert philox_ref(0, 4).tolist() == CLEAR
    ones = [torch.tensor(0xFFFFFFFF)] * 4
    assert [int(word) for word in philox_rounds(ones, (0xFFFFFFFF, 0xFFFFFFFF))] == SET


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("isa", INSTRUCTIONS)
def test_published_vectors_in_every_instruction_set(isa, tmp_path):
    flag, options = INSTRUCTIONS[isa]
    processor = Path("/proc/cpuinfo")
    if flag and not (processor.is_file() and f" {flag} " in processor.read_text()):
        pytest.skip(f"this processor has no {flag}")
    compile_ = ["g++", "-std=c++20", "-O1", *options, f"-I{ROOT}", "-x", "c++", "-", "-o", str(tmp_path / "words")]
    subprocess.run(compile_, input=RULES, text=True, check=True)
    out = subprocess.run([tmp_path / "words"], capture_output=True, text=True, check=True).stdout
    wide = philox_ref((3 << 40) + 9, 256, 4 * (2**32 - 8))
    assert [int(word, 16) for word in out.split()] == CLEAR + SET + wide.tolist()


@pytest.mark.parametrize("seed, first", STREAMS)
def test_triton_makes_the_same(seed, first, device, no_worse):
    words = torch.empty(64, dtype=torch.int64, device=device)
    normals, signs = torch.empty(64, device=device), torch.empty(2048, device=device)
    everything_kernel[(1,)](words, normals, signs, seed, first)
    assert torch.equal(words, philox_ref(seed, 64, 4 * first, device))
    assert torch.equal(signs, signs_ref(seed, 2048, 128 * first, device).float())
    exact = normals_ref(seed, 64, 4 * first, device)
    no_worse(normals, exact.float(), exact)


@pytest.mark.parametrize("offset", [0, 1, 31, 33, 130])
def test_a_part_of_a_stream_is_a_slice_of_it(offset):
    for stream in (philox_ref, signs_ref, normals_ref):
        assert torch.equal(stream(3, 50, offset), stream(3, 50 + offset)[offset:])
        assert stream(3, 0, offset).shape == (0,)


def test_numbers_are_independent_and_standard():
    n = 1 << 18
    z, v = normals_ref(11, n), signs_ref(11, n)
    six = 6 / n**0.5  # standard errors
    assert abs(z.mean()) < six
    assert abs(z.square().mean() - 1) < six * 2**0.5
    assert abs(z.pow(4).mean() - 3) < six * 96**0.5
    assert abs((z[::2] * z[1::2]).mean()) < six * 2**0.5
    assert abs(v.mean()) < six
    assert abs((v[1:] * v[:-1]).mean()) < six
    assert abs((signs_ref(12, n) * v).mean()) < six


@pytest.mark.parametrize("seed, offset", [(1 << 63, 0), (-(1 << 63) - 1, 0), (0, -1), (0, 1 << 63)])
def test_what_does_not_fit_is_named(seed, offset):
    with pytest.raises(ValueError, match=r"f: (seed|offset) is -?\d+; wanted an integer from"):
        check_stream("f", seed, offset)
