"""Tests of philox_normal: noise by counter."""

from __future__ import annotations

import math

import pytest
import torch
from support.philox_python import float64_normals, philox_python

from diffupose import ops, reference
from diffupose.errors import BackendUnavailableError
from diffupose.ops import _backend
from diffupose.reference.philox_normal import philox_4x32_10
from diffupose.testing import assert_parity, make_inputs, requires_cpp, shape_id

# Random123's tests/kat_vectors, the three "philox4x32 10" lines: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.fixture(params=["torch", pytest.param("cpp", marks=requires_cpp), "cuda"])
def backend(request, device):
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("C++ runs on the CPU")
    if request.param == "cuda" and device.type == "cpu":
        request.getfixturevalue("emulated_cuda")
    return request.param


@pytest.fixture
def fused(backend):
    return lambda *inputs: ops.philox_normal(*inputs, backend=backend)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_values(counter, key, words, device):
    k0, k1 = words_of(key)
    assert philox_4x32_10(torch.tensor(words_of(counter), device=device), (k0, k1)).tolist() == words_of(words)


@requires_cpp
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_values_cpp(counter, key, words):
    assert list(_backend.cpp().philox_4x32_10(words_of(counter), words_of(key))) == words_of(words)


def test_integers_match_python():
    """The words include each bit set and not set."""
    counters = torch.randint(0, 2**32, (500, 4))
    counters[:100] = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])[torch.randint(0, 5, (100, 4))]
    key = (0xFFFFFFFF, 0x80000001)
    expected = [philox_python(counter, list(key)) for counter in counters.tolist()]
    assert philox_4x32_10(counters, key).tolist() == expected
    if ops.available_backends()["cpp"][0]:
        assert [list(_backend.cpp().philox_4x32_10(counter, key)) for counter in counters.tolist()] == expected


GOLDEN_FIRST = [0.03984753, 0.42969707, -0.27972659, 1.52312112, -0.21303302, -0.02257337]
GOLDEN_LAST = [-1.73979306, 1.88685429, 0.54618889, 0.57967389, -1.65774536, -0.61767071]


def test_golden_numbers(fused, device):
    """A change of the counter's layout would change every published result."""
    ids = torch.tensor([0, -1], device=device), torch.tensor([0, 3], device=device)
    noise = fused(2**63 + 5, *ids, ops.INITIAL_NOISE_STEP, 6).double().cpu()
    torch.testing.assert_close(noise[0, 0], torch.tensor(GOLDEN_FIRST).double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(noise[1, 1], torch.tensor(GOLDEN_LAST).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 10, 51), (33, 3, 48), (2, 2, 2), (3, 1, 7)], ids=shape_id)
def test_parity(fused, shape, device):
    inputs = make_inputs("philox_normal", shape, device=device)
    assert_parity(fused, reference.philox_normal, inputs, exact=float64_normals)
    error = (fused(*inputs).double().cpu() - float64_normals(*inputs)).abs().max()
    assert error < 1e-6


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("step", [0, 1, 0xFFFF])
def test_extreme_counters(fused, seed, step, device):
    limits = torch.iinfo(torch.int64)
    frame_ids = torch.tensor([0, -1, limits.min, limits.max, 2**32, 2**32 - 1], device=device)
    hypothesis_ids = torch.tensor([0, 2**31, 2**32 - 1], device=device)
    expected = float64_normals(seed, frame_ids, hypothesis_ids, step, 5)
    noise = fused(seed, frame_ids, hypothesis_ids, step, 5)
    torch.testing.assert_close(noise.double().cpu(), expected, rtol=0, atol=1e-6)


def test_largest_block(fused, device):
    """The last block of a step must not run into the next step's counter."""
    ids = torch.tensor([1], device=device), torch.tensor([2], device=device)
    noise = fused(3, *ids, 4, 4 << 16)[0, 0, -4:]
    key, counter = [3, 0], [1, 0, 2, 4 << 16 | 0xFFFF]
    words = philox_python(counter, key)
    radius = math.sqrt(-2 * math.log(((words[0] >> 8) + 1) / 2**24))
    assert noise[0].item() == pytest.approx(radius * math.cos(2 * math.pi * (words[1] >> 8) / 2**24), abs=1e-6)


def test_independent_of_batch(fused, backend, device):
    """A hypothesis has the same noise in every batch: the same bits in C++, up to the last bits in PyTorch."""
    seed, frame_ids, hypothesis_ids, step, num_elements = make_inputs("philox_normal", (70, 20, 51), device=device)
    whole = fused(seed, frame_ids, hypothesis_ids, step, num_elements)
    order = torch.randperm(70, device=device)
    parts = [
        (fused(seed, frame_ids[:1], hypothesis_ids, step, num_elements), whole[:1]),
        (fused(seed, frame_ids, hypothesis_ids[7:9], step, num_elements), whole[:, 7:9]),
        (fused(seed, frame_ids[order], hypothesis_ids, step, num_elements), whole[order]),
        (fused(seed, frame_ids, hypothesis_ids, step, 5), whole[..., :5]),
    ]
    for part, expected in parts:
        torch.testing.assert_close(part, expected, rtol=0, atol=0 if backend == "cpp" else 1e-6)


def test_independent_of_chunks(fused, backend, device, monkeypatch):
    """The reference's chunks of frames do not change the result."""
    inputs = make_inputs("philox_normal", (7, 3, 9), device=device)
    whole = fused(*inputs)
    monkeypatch.setitem(reference.philox_normal.__globals__, "_MAX_BLOCKS_AT_ONCE", 20)
    torch.testing.assert_close(fused(*inputs), whole, rtol=0, atol=0 if backend == "cpp" else 1e-6)


@requires_cpp
def test_threads_give_equal_bits():
    inputs = make_inputs("philox_normal", (200, 20, 51))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = ops.philox_normal(*inputs, backend="cpp")
        torch.set_num_threads(3)
        assert torch.equal(ops.philox_normal(*inputs, backend="cpp"), single)
    finally:
        torch.set_num_threads(threads)


def test_statistics(fused, device):
    """Moments and tails of a million numbers, and no correlation along any axis of the counter."""
    noise = fused(1, torch.arange(200, device=device), torch.arange(100, device=device), 3, 51).double().cpu()
    numel = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(numel)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / numel)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / numel)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / numel)
    expected = math.erfc(2 / math.sqrt(2))
    assert abs((noise.abs() > 2).double().mean() - expected) < 5 * math.sqrt(expected / numel)
    assert noise.abs().max() <= 5.77
    for axis in range(3):
        first, second = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
        assert abs((first * second).mean()) < 5 / math.sqrt(first.numel())
    other_step = fused(1, torch.arange(200, device=device), torch.arange(100, device=device), 4, 51).double().cpu()
    assert abs((noise * other_step).mean()) < 5 / math.sqrt(numel)


def test_every_argument_matters(fused, device):
    ids = torch.arange(2, device=device)
    noise = fused(0, ids, ids, 0, 4)
    assert noise.unique().numel() == noise.numel()
    for other in (fused(1, ids, ids, 0, 4), fused(2**32, ids, ids, 0, 4), fused(0, ids, ids, 1, 4)):
        assert not torch.isclose(noise, other).any()


def test_opcheck(backend, device):
    frame_ids, hypothesis_ids = torch.arange(3, device=device), torch.arange(2, device=device)
    results = torch.library.opcheck(
        torch.ops.diffupose.philox_normal.default, (-5, frame_ids, hypothesis_ids, 1, 7, backend)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_compile(backend, device):
    """One graph, for several seeds, steps and sizes."""

    def double_noise(seed, frame_ids, step):
        ids = torch.arange(3, device=device)
        return 2 * ops.philox_normal(seed, frame_ids, ids, step, 51, backend=backend)

    compiled = torch.compile(double_noise, fullgraph=True, backend="aot_eager")
    for seed in range(12):
        frame_ids = torch.arange(seed + 2, device=device)
        expected = double_noise(seed - 3, frame_ids, seed)
        torch.testing.assert_close(compiled(seed - 3, frame_ids, seed), expected, rtol=0, atol=2e-6)


def test_fake_tensors_and_meta():
    """Shapes without data: a fake tensor's null pointer never reaches C++."""
    with torch._subclasses.FakeTensorMode():
        assert ops.philox_normal(0, torch.arange(3), torch.arange(2), 0, 51).shape == (3, 2, 51)
    meta = ops.philox_normal(0, torch.arange(3, device="meta"), torch.arange(2, device="meta"), 0, 51)
    assert meta.shape == (3, 2, 51)
    assert meta.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_ids": torch.zeros(2, 2, dtype=torch.int64)}, r"frame_ids must have shape \[B\], got \(2, 2\)"),
        ({"frame_ids": torch.tensor([float("nan")])}, "frame_ids must be int64, got torch.float32"),
        ({"frame_ids": torch.zeros(2, dtype=torch.int32)}, "frame_ids must be int64, got torch.int32"),
        ({"hypothesis_ids": torch.tensor(1)}, r"hypothesis_ids must have shape \[H\], got \(\)"),
        ({"hypothesis_ids": torch.zeros(2, dtype=torch.bool)}, "hypothesis_ids must be int64"),
        (
            {"hypothesis_ids": torch.zeros(2, dtype=torch.int64, device="meta")},
            "on one device, got cpu and meta",
        ),
        ({"seed": 2**64}, r"seed must fit 64 bits.*18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed must fit 64 bits"),
        ({"step": -1}, r"step must lie in \[0, 65535\], got -1"),
        ({"step": 0x10000}, r"step must lie in \[0, 65535\], got 65536"),
        ({"num_elements": -1}, r"num_elements must lie in \[0, 262144\], got -1"),
        ({"num_elements": (4 << 16) + 1}, r"num_elements must lie in \[0, 262144\]"),
        ({"backend": "numpy"}, "backend must be one of auto, torch, cpp, cuda, triton; got 'numpy'"),
    ],
)
def test_errors(change, message):
    arguments = {
        "seed": 0,
        "frame_ids": torch.arange(2),
        "hypothesis_ids": torch.arange(3),
        "step": 0,
        "num_elements": 4,
    }
    with pytest.raises(ValueError, match=message):
        ops.philox_normal(**(arguments | change))


@requires_cpp
@pytest.mark.parametrize("null", ["frame_ids", "hypothesis_ids", "out"])
def test_null_pointers_are_rejected(null):
    frame_ids, hypothesis_ids, out = torch.arange(1), torch.arange(1), torch.zeros(4)
    arguments = {
        "frame_ids": frame_ids.data_ptr(),
        "hypothesis_ids": hypothesis_ids.data_ptr(),
        "out": out.data_ptr(),
        "num_frames": 1,
        "num_hypotheses": 1,
        "num_elements": 4,
        "seed": 0,
        "step": 0,
        "num_threads": 1,
    }
    _backend.cpp().philox_normal(**arguments)
    assert out.abs().min() > 0
    with pytest.raises(ValueError, match=f"{null} is a null pointer"):
        _backend.cpp().philox_normal(**(arguments | {null: 0}))


EDGES = [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 0), (1, 1, 1), (1, 1, 3), (1, 1, 4)]


@pytest.mark.parametrize("shape", EDGES, ids=shape_id)
def test_edges(fused, shape, device):
    inputs = make_inputs("philox_normal", shape, device=device)
    noise = fused(*inputs)
    assert noise.shape == shape
    assert noise.dtype == torch.float32
    assert noise.device.type == device.type
    torch.testing.assert_close(noise.double().cpu(), float64_normals(*inputs), rtol=0, atol=1e-6)


def test_non_contiguous_ids(fused, device):
    ids = torch.arange(40, device=device)
    expected = fused(0, ids[::2].clone(), ids[1::3].clone(), 0, 6)
    torch.testing.assert_close(fused(0, ids[::2], ids[1::3], 0, 6), expected, rtol=0, atol=0)


def test_default_dtype_changes_nothing(fused, device):
    inputs = make_inputs("philox_normal", (3, 2, 9), device=device)
    expected = fused(*inputs)
    torch.set_default_dtype(torch.float64)
    try:
        noise = fused(*inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_unavailable_backend(name):
    with pytest.raises(BackendUnavailableError, match=f'backend "{name}" '):
        ops.philox_normal(0, torch.arange(1), torch.arange(1), 0, 4, backend=name)
