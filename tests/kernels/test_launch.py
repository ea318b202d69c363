"""The device, the rounding and the width of addresses of every launch."""

from __future__ import annotations

import contextlib

import pytest
import torch

from diffupose.kernels import _launch
from diffupose.kernels.hypothesis_statistics import hypothesis_statistics
from diffupose.kernels.philox_normal import philox_normal
from diffupose.kernels.reverse_step import DrawnNoise, TableRow, reverse_step


def test_large():
    """Tensors are large if an offset, up to a whole block past the end, needs more than 32 bits."""
    most = 2**31 - 2**16
    for sizes, large in (((most,), False), ((most + 1,), True), ((2**33,), True), ((0, 2**40), False)):
        assert _launch.is_large(torch.empty(*sizes, device="meta")) == large, sizes
    wide = torch.empty(2, 2**30, 3, device="meta")[..., :1]  # few numbers, far apart
    assert _launch.is_large(None, wide)
    assert not _launch.is_large(None)


@pytest.fixture
def launched(monkeypatch):
    """Launch nothing, and return the options of each launch."""
    options = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, *arguments, **given: options.append(given))
    return options


@pytest.mark.parametrize(("frames", "large"), [(64, False), (1 << 24, True)])
def test_addresses_of_large_tensors(launched, frames, large):
    """1.7e8 poses of 51 numbers."""
    sample, ids = torch.empty(frames, 10, 17, 3, device="meta"), torch.empty(10, dtype=torch.int64, device="meta")
    frame_ids = torch.empty(frames, dtype=torch.int64, device="meta")
    seed = step = torch.empty(1, dtype=torch.int64, device="meta")
    row = TableRow(torch.empty(3, 6, device="meta"), step)
    reverse_step(sample, sample, row, noise=DrawnNoise(seed, frame_ids, ids))
    philox_normal(seed, frame_ids, ids, 0, 51)
    assert [options["LARGE"] for options in launched] == [large, large]
    # Each operation is rounded by itself, as in the other backends: so noise and step are the same.
    assert [options["enable_fp_fusion"] for options in launched] == [False, False]


def test_statistics_are_fused(launched):
    hypothesis_statistics(torch.empty(3, 7, 17, 3), None, None, None, 1.0, 0.01)
    assert launched[0]["enable_fp_fusion"]


class Kernel:
    """Records the current device at its launch."""

    def __init__(self):
        self.current, self.launches = 0, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, self.current, options))

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before


class OnDevice:
    def __init__(self, name):
        self.device = torch.device(name)


def test_kernels_go_to_the_device_of_their_tensors(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: kernel.current)
    monkeypatch.setattr(torch.cuda, "device", kernel.device)
    for name in ("cuda:0", "cuda:1", "cpu"):
        _launch.launch(kernel, (3,), OnDevice(name), enable_fp_fusion=False, num_warps=2)
    _launch.launch(kernel, (3, 0), OnDevice("cuda:1"), enable_fp_fusion=False)  # an empty grid launches nothing
    options = {"enable_fp_fusion": False, "num_warps": 2}
    assert kernel.launches == [((3,), 0, options), ((3,), 1, options), ((3,), 0, options)]
