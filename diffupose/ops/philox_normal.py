"""Gaussian noise by counter: the public op over all backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffupose import reference
from diffupose.ops._backend import Backend, choose_backend
from diffupose.ops._common import call_extension, register
from diffupose.reference.philox_normal import INITIAL_NOISE_STEP

MAX_ELEMENTS = 4 << 16
"""The counter has 16 bits for the block of four elements."""


def philox_normal(
    seed: int,
    frame_ids: Tensor,
    hypothesis_ids: Tensor,
    step: int,
    num_elements: int,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return standard normal noise that depends only on seed, frame, hypothesis, step and element.

    The noise of a hypothesis is the same in every batch, chunk, thread, device and process. The random integers are
    the same bits; the normals are within 1e-6 of the float64 transform. The C++ code gives the same bits for any batch.

    Args:
        seed: 64 bits, in [-2^63, 2^64); a negative seed means the unsigned number of the same bits.
        frame_ids: Ids of shape ``[B]``, int64, read as unsigned.
        hypothesis_ids: Ids of shape ``[H]``, int64, in [0, 2^32); only the low 32 bits count.
        step: Index of the row in the step table, in [0, 0xFFFF); ``INITIAL_NOISE_STEP`` (0xFFFF) for the noise the
            process starts from.
        num_elements: Numbers per hypothesis, at most 262144; element ``3 j + axis`` belongs to joint ``j``.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; None takes the environment variable
            DIFFUPOSE_BACKEND, or else ``"auto"``.

    Returns:
        Noise of shape ``[B, H, num_elements]``, float32, on the device of ``frame_ids``; no value exceeds 5.77.

    Raises:
        ValueError: If an argument has the wrong shape, type, device or range.
        BackendUnavailableError: If the named backend cannot run here.

    Example:
        >>> noise = philox_normal(0, torch.arange(2), torch.arange(5), INITIAL_NOISE_STEP, 51)
        >>> noise.shape
        torch.Size([2, 5, 51])
        >>> alone = philox_normal(0, torch.tensor([1]), torch.arange(5), INITIAL_NOISE_STEP, 51)
        >>> torch.allclose(noise[1:], alone, atol=1e-6)
        True

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
    """
    check_ids(frame_ids, hypothesis_ids)
    signed_seed = signed(seed)
    if not 0 <= step <= INITIAL_NOISE_STEP:
        raise ValueError(f"step must lie in [0, {INITIAL_NOISE_STEP}], got {step}")
    if not 0 <= num_elements <= MAX_ELEMENTS:
        raise ValueError(f"num_elements must lie in [0, {MAX_ELEMENTS}], got {num_elements}")
    return torch.ops.diffupose.philox_normal.default(
        signed_seed, frame_ids, hypothesis_ids, step, num_elements, backend
    )


def check_ids(frame_ids: Tensor, hypothesis_ids: Tensor) -> None:
    """Raise ``ValueError`` unless these are vectors of int64 on one device."""
    for name, ids, axis in (("frame_ids", frame_ids, "B"), ("hypothesis_ids", hypothesis_ids, "H")):
        if ids.ndim != 1:
            raise ValueError(f"{name} must have shape [{axis}], got {tuple(ids.shape)}")
        if ids.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {ids.dtype}")
    if frame_ids.device != hypothesis_ids.device:
        raise ValueError(
            f"frame_ids and hypothesis_ids must be on one device, got {frame_ids.device} and {hypothesis_ids.device}"
        )


def signed(seed: int) -> int:
    """Return the signed number of the same 64 bits, which is what an op's schema holds; or raise ``ValueError``."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, in [-2^63, 2^64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _run_extension(
    backend: str, seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int
) -> Tensor:
    frame_ids, hypothesis_ids = frame_ids.contiguous(), hypothesis_ids.contiguous()
    out = _fake(seed, frame_ids, hypothesis_ids, step, num_elements)
    frames, hypotheses, _ = out.shape
    arguments: dict[str, Any] = {
        "seed": seed,
        "frame_ids": frame_ids.data_ptr(),
        "hypothesis_ids": hypothesis_ids.data_ptr(),
        "out": out.data_ptr(),
        "step": step,
        "num_frames": frames,
        "num_hypotheses": hypotheses,
        "num_elements": num_elements,
    }
    call_extension(backend, "philox_normal", out, arguments)
    return out


def _run_triton(*arguments: Any) -> Tensor:
    from diffupose.kernels.philox_normal import philox_normal as kernel

    return kernel(*arguments)


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "torch": reference.philox_normal,
    "cpp": partial(_run_extension, "cpp"),
    "cuda": partial(_run_extension, "cuda"),
    "triton": _run_triton,
}


def _run(seed: int, frame_ids: Tensor, *arguments: Any) -> Tensor:
    *others, backend = arguments
    chosen = choose_backend(backend, frame_ids.device, _IMPLEMENTATIONS)
    return _IMPLEMENTATIONS[chosen](seed, frame_ids, *others)


def _fake(seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int, *_: Any) -> Tensor:
    return frame_ids.new_empty(frame_ids.shape[0], hypothesis_ids.shape[0], num_elements, dtype=torch.float32)


register(
    "philox_normal(SymInt seed, Tensor frame_ids, Tensor hypothesis_ids, SymInt step, SymInt num_elements, "
    "str? backend) -> Tensor",
    _run,
    _fake,
)
