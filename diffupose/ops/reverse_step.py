"""One step of the reverse process: the public op over all backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffupose.ops._backend import Backend, choose_backend, is_transformed, name_of
from diffupose.ops._common import address, call_extension, check_device, check_shape, packed, register, unfit_for
from diffupose.ops.philox_normal import check_ids, signed
from diffupose.reference.reverse_step import reverse_step as _reference


def reverse_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    step: int | Tensor,
    *,
    x0_last: Tensor | None = None,
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    seed: int = 0,
    frame_ids: Tensor | None = None,
    hypothesis_ids: Tensor | None = None,
    clip_sample_range: float | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sample of the next, less noisy, timestep and the predicted clean one.

        x0     = p x_t + q out                                 clipped to ±clip_sample_range if that is given
        x_prev = c_x x_t + c_0 x0 + c_1 x0_last + s noise_scale z

    A term whose coefficient is 0 is skipped, so a NaN in it does not matter.

    Args:
        sample: x_t of shape ``[B, H, J, 3]``, in the model's data units.
        model_output: ``[B, H, J, C]`` with C >= 3; channels after the third are ignored.
        coefficients: The table ``[S, 6]`` with columns p, q, c_x, c_0, c_1, s (``StepTable.tensor()``), on the CPU, or
            on the device of ``sample`` where ``step`` is a tensor.
        step: Row of the table, in [0, S); an int, or a tensor of one int64 on the device of ``sample``. ``"cuda"`` and
            ``"triton"`` read the tensor on the device, without a copy or a wait. So a CUDA graph of the call takes the
            row that the tensor holds when it is replayed. The range of such a step is not checked.
        x0_last: The previous step's x0, for multistep samplers (rows with c_1 != 0). If such a row is read on the
            device and this is None, the sample becomes NaN.
        noise: z of the same shape as ``sample``; None draws it by counter from ``seed``, ``frame_ids`` and
            ``hypothesis_ids``.
        noise_scale: ``[S, J, 3]``, a second factor of z besides s (``StepTable.noise_scale_tensor()``); None is 1.
        seed: 64-bit seed of drawn noise.
        frame_ids: ``[B]`` int64; default ``arange(B)``.
        hypothesis_ids: ``[H]`` int64; default ``arange(H)``.
        clip_sample_range: Limit of x0, in the model's data units.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; None takes the environment variable
            DIFFUPOSE_BACKEND, or else ``"auto"``. C++ takes float32, CUDA and Triton also float16 and bfloat16. Only
            ``"torch"`` has a gradient.

    Returns:
        ``prev_sample`` and ``pred_original_sample``, both ``[B, H, J, 3]`` and in the common dtype of ``sample`` and
        ``model_output``. Those of ``"cpp"``, ``"cuda"`` and ``"triton"`` are the same bits for any batch and number of
        threads.

    Raises:
        ValueError: If a shape or the step does not fit, or the row needs an ``x0_last`` that is not given.
        BackendUnavailableError: If the named backend cannot run here.

    Reference:
        DiffuPose eq. 3 and Algorithm 2; Song et al. 2021 (DDIM); Lu et al. 2022 (DPM-Solver++).
    """
    if sample.ndim != 4 or sample.shape[-1] != 3:
        raise ValueError(f"sample must have shape [B, H, J, 3], got {tuple(sample.shape)}")
    if model_output.ndim != 4 or model_output.shape[:-1] != sample.shape[:-1] or model_output.shape[-1] < 3:
        expected = [*sample.shape[:-1], "3 or more"]
        raise ValueError(f"model_output must have shape {expected}, got {tuple(model_output.shape)}")
    home = sample.device if isinstance(step, Tensor) else torch.device("cpu")
    if coefficients.ndim != 2 or coefficients.shape[1] != 6 or coefficients.device != home:
        where = "the CPU" if home.type == "cpu" else str(home)
        raise ValueError(
            f"coefficients must have shape [S, 6] on {where}, got {tuple(coefficients.shape)} on {coefficients.device}"
        )
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.dtype != torch.int64 or step.device != home:
            raise ValueError(
                f"step must be an int, or one int64 on {home}, got {step.dtype} {tuple(step.shape)} on {step.device}"
            )
    else:
        _check_step(step, coefficients)
    for name, tensor in (("x0_last", x0_last), ("noise", noise)):
        if tensor is not None and tensor.shape != sample.shape:
            raise ValueError(f"{name} must have the shape of sample, {tuple(sample.shape)}, got {tuple(tensor.shape)}")
    if clip_sample_range is not None and not clip_sample_range >= 0:
        raise ValueError(f"clip_sample_range must not be negative, got {clip_sample_range}")
    if noise_scale is not None:
        check_shape("noise_scale", noise_scale, (coefficients.shape[0], *sample.shape[2:]))
    number, step_on_device = (0, step.view(1)) if isinstance(step, Tensor) else (step, None)
    inputs = _Inputs(
        sample, model_output, coefficients, number, step_on_device, x0_last, noise, noise_scale, signed(seed),
        frame_ids, hypothesis_ids, clip_sample_range, backend,
    )  # fmt: skip
    tensors, device = inputs.tensors(), sample.device
    for name, tensor in (tensors | {"frame_ids": frame_ids, "hypothesis_ids": hypothesis_ids}).items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_device(name, tensor, "sample", device)
    transformed = is_transformed()
    if transformed or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())):
        unfit = unfit_for("has no rules for torch.func" if transformed else "has no gradient")
        choose_backend(backend, sample.device, _IMPLEMENTATIONS, unfit=unfit)
        return _run_torch(_with_row_on_host(inputs))
    return torch.ops.diffupose.reverse_step.default(*inputs)


def _check_step(step: int, coefficients: Tensor) -> None:
    if not 0 <= step < coefficients.shape[0]:
        raise ValueError(f"step must lie in [0, {coefficients.shape[0]}), got {step}")


class _Inputs(NamedTuple):
    """The raw op's arguments, in its order; ``step`` is used if ``step_on_device`` is None."""

    sample: Tensor
    model_output: Tensor
    coefficients: Tensor
    step: int
    step_on_device: Tensor | None
    x0_last: Tensor | None
    noise: Tensor | None
    noise_scale: Tensor | None
    seed: int
    frame_ids: Tensor | None
    hypothesis_ids: Tensor | None
    clip_sample_range: float | None
    backend: str | None

    def tensors(self) -> dict[str, Tensor]:
        """Return the floating-point tensors that are given, by name."""
        names = "sample", "model_output", "x0_last", "noise", "noise_scale"
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def ids(self) -> tuple[Tensor, Tensor]:
        """Return the ids of drawn noise, checked and contiguous."""
        frames, hypotheses, _, _ = self.sample.shape
        frame_ids, hypothesis_ids = (
            torch.arange(count, device=self.sample.device) if ids is None else ids.contiguous()
            for ids, count in ((self.frame_ids, frames), (self.hypothesis_ids, hypotheses))
        )
        check_shape("frame_ids", frame_ids, (frames,))
        check_shape("hypothesis_ids", hypothesis_ids, (hypotheses,))
        check_ids(frame_ids, hypothesis_ids)
        return frame_ids, hypothesis_ids


def _with_row_on_host(inputs: _Inputs) -> _Inputs:
    """Return the inputs with their row on the CPU, checked; this waits for the device."""
    if inputs.step_on_device is not None:
        table, step = inputs.coefficients.cpu(), int(inputs.step_on_device)
        inputs = inputs._replace(coefficients=table, step=step, step_on_device=None)
        _check_step(inputs.step, inputs.coefficients)
    p, q, *others = inputs.coefficients[inputs.step].tolist()
    if others[2] != 0.0 and inputs.x0_last is None:
        raise ValueError(f"x0_last is needed by row {inputs.step} of this table (c_1 = {others[2]:g}), got None")
    if not any((p, q)) or not any(others):
        raise ValueError("a row of the step table must have a term that is not 0")
    return inputs


def _run_torch(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    sample, model_output, noise = inputs.sample, inputs.model_output, inputs.noise
    if noise is None and float(inputs.coefficients[inputs.step, 5]) != 0.0:
        code = "torch" if inputs.backend == "torch" else None
        draw = torch.ops.diffupose.philox_normal.default
        drawn = draw(inputs.seed, *inputs.ids(), inputs.step, 3 * sample.shape[2], code)
        noise = drawn.view(sample.shape).to(sample.dtype)
    results = _reference(
        sample, model_output, inputs.coefficients, inputs.step, inputs.x0_last, noise, inputs.clip_sample_range,
        inputs.noise_scale,
    )  # fmt: skip
    dtype = torch.promote_types(sample.dtype, model_output.dtype)
    return results[0].to(dtype), results[1].to(dtype)


def _run_extension(backend: str, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    row = inputs.coefficients[inputs.step].tolist() if inputs.step_on_device is None else None
    dtype = torch.promote_types(inputs.sample.dtype, inputs.model_output.dtype)
    sample = packed(inputs.sample, dtype)
    output = inputs.model_output[..., :3].flatten(0, 2)  # [B H J, 3]
    output = output if output.stride(1) == 1 else output.contiguous()
    x0_last = noise = scale = frame_ids = hypothesis_ids = None
    # A row that only the device knows may need everything that is given.
    if inputs.x0_last is not None and (row is None or row[4] != 0.0):
        x0_last = packed(inputs.x0_last, dtype)
    if row is None or row[5] != 0.0:
        if inputs.noise_scale is not None:
            scale = inputs.noise_scale[inputs.step] if backend == "cpp" else inputs.noise_scale
            scale = packed(scale, torch.float32)
        if inputs.noise is not None:
            noise = packed(inputs.noise, torch.float32)
        else:
            frame_ids, hypothesis_ids = inputs.ids()
    prev_sample, x0 = torch.empty_like(sample), torch.empty_like(sample)
    frames, hypotheses, joints, _ = sample.shape
    arguments: dict[str, Any] = {
        "row": row,
        "step": inputs.step,
        "clip": inputs.clip_sample_range,
        "sample": sample.data_ptr(),
        "model_output": output.data_ptr(),
        "output_stride": output.stride(0),
        "x0_last": address(x0_last),
        "noise": address(noise),
        "noise_scale": address(scale),
        "seed": inputs.seed,
        "frame_ids": address(frame_ids),
        "hypothesis_ids": address(hypothesis_ids),
        "prev_sample": prev_sample.data_ptr(),
        "x0": x0.data_ptr(),
        "num_frames": frames,
        "num_hypotheses": hypotheses,
        "num_joints": joints,
    }
    if backend == "cuda":
        table = inputs.coefficients.float().contiguous() if row is None else None
        arguments |= {"table": address(table), "index": address(inputs.step_on_device)}
        arguments |= {"dtype": name_of(dtype), "output_dtype": name_of(output.dtype)}
    call_extension(backend, "reverse_step", sample, arguments)
    return prev_sample, x0


def _run_triton(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    from diffupose.kernels.reverse_step import DrawnNoise, TableRow
    from diffupose.kernels.reverse_step import reverse_step as kernel

    device = inputs.sample.device
    table, step = inputs.coefficients.to(device, torch.float32), inputs.step_on_device
    noise: Tensor | DrawnNoise | None = inputs.noise
    draws = noise is None
    if step is None:
        step = torch.full((1,), inputs.step, dtype=torch.int64, device=device)
        draws = draws and float(inputs.coefficients[inputs.step, 5]) != 0.0
    if draws:
        noise = DrawnNoise(inputs.seed, *inputs.ids())
    row = TableRow(table.contiguous(), step, inputs.noise_scale)
    prev_sample, x0 = kernel(inputs.sample, inputs.model_output, row, inputs.x0_last, noise, inputs.clip_sample_range)
    assert x0 is not None
    return prev_sample, x0


_IMPLEMENTATIONS: dict[str, Callable[[_Inputs], tuple[Tensor, Tensor]]] = {
    "torch": _run_torch,
    "cpp": partial(_run_extension, "cpp"),
    "cuda": partial(_run_extension, "cuda"),
    "triton": _run_triton,
}
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _unfit(inputs: _Inputs) -> dict[str, str]:
    """Return which backends cannot take these inputs, and why: the first tensor that does not fit is named."""
    unfit: dict[str, str] = {}
    for name, tensor in inputs.tensors().items():
        if tensor.dtype == torch.float32:
            continue
        unfit = unfit_for(f"takes {name} in float32, got {tensor.dtype}", ("cpp",)) | unfit
        if tensor.dtype not in _GPU_DTYPES:
            reason = f"takes {name} in float32, float16 or bfloat16, got {tensor.dtype}"
            unfit = unfit_for(reason, ("cuda", "triton")) | unfit
    if unfit and inputs.x0_last is not None:
        dtype = torch.promote_types(inputs.sample.dtype, inputs.model_output.dtype)
        if torch.promote_types(inputs.x0_last.dtype, dtype) != dtype:
            unfit |= unfit_for(f"takes x0_last in {dtype}, as its results, got {inputs.x0_last.dtype}", ("cuda",))
    return unfit


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(*arguments)
    chosen = choose_backend(inputs.backend, inputs.sample.device, _IMPLEMENTATIONS, unfit=_unfit(inputs))
    if inputs.step_on_device is None or chosen in ("torch", "cpp"):
        inputs = _with_row_on_host(inputs)
    return _IMPLEMENTATIONS[chosen](inputs)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(*arguments)
    dtype = torch.promote_types(inputs.sample.dtype, inputs.model_output.dtype)
    first, second = (inputs.sample.new_empty(inputs.sample.shape, dtype=dtype) for _ in range(2))
    return first, second


register(
    "reverse_step(Tensor sample, Tensor model_output, Tensor coefficients, SymInt step, Tensor? step_on_device, "
    "Tensor? x0_last, Tensor? noise, Tensor? noise_scale, SymInt seed, Tensor? frame_ids, Tensor? hypothesis_ids, "
    "float? clip_sample_range, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
