"""Gaussian noise by counter: the public op over the reference and the code of the backends."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose import reference
from diffupose.ops._backend import Backend, choose_backend, cpp, cuda, on_device, stream_of
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
    """Return standard normal noise that depends on seed, frame, hypothesis, step and element alone.

    The noise of a hypothesis is the same in every batch, chunk, thread, device and process: the random integers bit
    for bit, the normals within 1e-6 of the float64 transform. The C++ code gives the same bits for any batch.

    Args:
        seed: 64 bits, in [-2^63, 2^64); a negative seed is the unsigned number of the same bits.
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
    """Raise ``ValueError`` unless these can be ids."""
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
    """Return the number of the same 64 bits that a schema's int, which is signed, can hold; or raise ValueError."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, in [-2^63, 2^64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _run_torch(seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int) -> Tensor:
    return reference.philox_normal(seed, frame_ids, hypothesis_ids, step, num_elements)


def _run_cpp(seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int) -> Tensor:
    frame_ids, hypothesis_ids = frame_ids.contiguous(), hypothesis_ids.contiguous()
    out = torch.empty(len(frame_ids), len(hypothesis_ids), num_elements, dtype=torch.float32)
    cpp().philox_normal(
        seed=seed,
        frame_ids=frame_ids.data_ptr(),
        hypothesis_ids=hypothesis_ids.data_ptr(),
        step=step,
        out=out.data_ptr(),
        num_frames=len(frame_ids),
        num_hypotheses=len(hypothesis_ids),
        num_elements=num_elements,
        num_threads=torch.get_num_threads(),
    )
    return out


def _run_cuda(seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int) -> Tensor:
    frame_ids, hypothesis_ids = frame_ids.contiguous(), hypothesis_ids.contiguous()
    out = frame_ids.new_empty(len(frame_ids), len(hypothesis_ids), num_elements, dtype=torch.float32)
    with on_device(frame_ids):
        cuda().philox_normal(
            seed=seed,
            frame_ids=frame_ids.data_ptr(),
            hypothesis_ids=hypothesis_ids.data_ptr(),
            step=step,
            out=out.data_ptr(),
            num_frames=len(frame_ids),
            num_hypotheses=len(hypothesis_ids),
            num_elements=num_elements,
            stream=stream_of(frame_ids),
        )
    return out


def _run_triton(seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int) -> Tensor:
    from diffupose.kernels.philox_normal import philox_normal as kernel

    return kernel(seed, frame_ids, hypothesis_ids, step, num_elements)


_IMPLEMENTATIONS = {"torch": _run_torch, "cpp": _run_cpp, "cuda": _run_cuda, "triton": _run_triton}


def _run(
    seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int, backend: str | None
) -> Tensor:
    run = _IMPLEMENTATIONS[choose_backend(backend, frame_ids.device, _IMPLEMENTATIONS)]
    return run(seed, frame_ids, hypothesis_ids, step, num_elements)


def _fake(
    seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int, backend: str | None
) -> Tensor:
    return frame_ids.new_empty(frame_ids.shape[0], hypothesis_ids.shape[0], num_elements, dtype=torch.float32)


_lib = torch.library.Library("diffupose", "FRAGMENT")
_lib.define(
    "philox_normal(SymInt seed, Tensor frame_ids, Tensor hypothesis_ids, SymInt step, SymInt num_elements, "
    "str? backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.impl("philox_normal", _run, "CPU")
_lib.impl("philox_normal", _run, "CUDA")
torch.library.register_fake("diffupose::philox_normal", _fake, lib=_lib)
