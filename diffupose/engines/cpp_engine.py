"""The whole denoiser in one call: its packed form, and the public op."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffupose.engines.layer_program import Attention, GraphConv, Layer, LayerProgram, Linear
from diffupose.ops._backend import Backend, cpp
from diffupose.schedule import StepTable

Precision = Literal["float32", "bfloat16"]
"""What the products of a packed denoiser are taken in; sums and everything else are float32."""


class PackedDenoiser:
    """A denoiser whose weights lie as the C++ engine reads them, for one instruction set and one precision.

    Args:
        program: The layers.
        precision: ``"float32"`` or ``"bfloat16"``, which rounds weights and activations of every product; fast on
            processors with AVX512-BF16 only.

    Raises:
        BackendUnavailableError: If there is no C++ extension.
        ValueError: If the precision is unknown, or a layer does not fit.
    """

    backend: Backend = "cpp"

    def __init__(self, program: LayerProgram, precision: Precision = "float32") -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        self.program, self.precision = program, precision
        engine = cpp().Engine(program.num_joints, list(program.widths), precision == "bfloat16")
        self._offsets: list[tuple[int, int]] = []  # where each slot begins, and its channels
        used = 0
        for layer in program.layers:
            check_shapes(layer, program.num_joints)
            buffers = {"input": layer.input, "output": layer.output}
            if isinstance(layer, GraphConv):
                c_in, c_out = layer.weight.shape[1:]
                weight = torch.cat((layer.weight[0], layer.weight[1]), dim=-1)  # [C_in, 2 C_out]
                kept = [_plain(value) for value in (weight, layer.own, layer.neighbors, layer.adjacency, layer.bias)]
                names = ("weight", "own", "neighbors", "adjacency", "bias")
                pointers = {name: value.data_ptr() for name, value in zip(names, kept, strict=True)}
                engine.add_graph_conv(
                    **buffers, residual=layer.residual, activation=layer.activation, c_in=c_in, c_out=c_out, **pointers
                )
            elif isinstance(layer, Linear):
                weight, bias = _plain(layer.weight), _plain(layer.bias)
                engine.add_linear(
                    **buffers, residual=layer.residual, c_in=weight.shape[0], c_out=weight.shape[1],
                    weight=weight.data_ptr(), bias=bias.data_ptr(), bias_per_joint=bias.ndim == 2,
                )  # fmt: skip
            elif isinstance(layer, Attention):
                engine.add_attention(**buffers, num_heads=layer.num_heads, channels=layer.channels)
            else:
                if layer.slot != len(self._offsets):
                    raise ValueError(
                        "slots must count the layers that scale and shift, "
                        f"expected {len(self._offsets)}, got {layer.slot}"
                    )
                engine.add_scale_shift(
                    **buffers, normalize=layer.normalize, eps=layer.eps, channels=layer.channels, offset=used
                )
                self._offsets.append((used, layer.channels))
                used += 2 * engine.padded(layer.channels)
        self._engine = engine
        self._table: tuple[bytes, Tensor] | None = None

    @property
    def isa(self) -> str:
        """The instruction set that it was packed for."""
        return self._engine.isa

    @property
    def max_hypotheses(self) -> int:
        """How many hypotheses to take at once: memory does not grow with them, a progress bar moves between."""
        return 4096

    @property
    def name(self) -> str:
        """What runs, for people."""
        return f"cpp {self.isa}"

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        return self._engine.weight_bytes

    def for_hypotheses(self, count: int) -> PackedDenoiser:
        """Return this denoiser as it is best for so many hypotheses in all."""
        return self

    def _padded(self, channels: int) -> int:
        return self._engine.padded(channels)

    def _num_parameters(self) -> int:
        return self._engine.num_parameters

    def _place(self, value: Tensor) -> Tensor:
        """Return a tensor as the engine reads it: float32, contiguous, where the engine is."""
        return _plain(value)

    def parameters(self, timesteps: Tensor) -> Tensor:
        """Return the scales and shifts of all steps, ``[S, ...]``, as the engine reads them; the last ones are kept."""
        timesteps = timesteps.to("cpu", torch.int64)
        key = timesteps.numpy().tobytes()
        kept = self._table
        if kept is None or kept[0] != key:
            # Replaced as one object: another thread sees the old or the new pair.
            self._table = kept = (key, self._place(self.tabulate(timesteps)))
        return kept[1]

    def tabulate(self, timesteps: Tensor) -> Tensor:
        """Return the scales and shifts of all steps, ``[S, ...]``, as the engine reads them, on the CPU."""
        pairs = self.program.tabulate(timesteps)
        if len(pairs) != len(self._offsets):
            raise ValueError(f"the program must tabulate {len(self._offsets)} pairs, got {len(pairs)}")
        table = torch.zeros(len(timesteps), self._num_parameters(), dtype=torch.float32)
        for (offset, channels), pair in zip(self._offsets, pairs, strict=True):
            for begin, values in zip((offset, offset + self._padded(channels)), pair, strict=True):
                _check_shape("scale and shift", values, [len(timesteps), channels])
                table[:, begin : begin + channels] = values
        return table

    def denoise(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's output ``[N, J, C_out]``.

        Args:
            sample: x_t of shape ``[N, J, 3]``.
            condition: ``[N, J, C]``.
            timesteps: Integers of shape ``[1]`` or ``[N]``.

        Raises:
            ValueError: If a shape does not fit.
        """
        joints, channels = self.program.num_joints, self.program.widths[0] - 3
        if sample.ndim != 3 or sample.shape[1:] != (joints, 3):
            raise ValueError(f"sample must have shape [N, {joints}, 3], got {tuple(sample.shape)}")
        count = len(sample)
        if condition.shape != (count, joints, channels):
            raise ValueError(f"condition must have shape {[count, joints, channels]}, got {tuple(condition.shape)}")
        if timesteps.ndim != 1 or len(timesteps) not in (1, count):
            raise ValueError(f"timesteps must have shape [1] or [{count}], got {tuple(timesteps.shape)}")
        if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, got {timesteps.dtype}")
        sample, condition = self._place(sample), self._place(condition)
        out = sample.new_empty(count, joints, self.program.widths[-1])
        if len(timesteps) == 1:
            self._denoise(sample, condition, self.parameters(timesteps), out)
            return out
        for timestep in timesteps.unique():
            rows = torch.nonzero(timesteps == timestep).squeeze(1)
            part = sample.new_empty(len(rows), joints, self.program.widths[-1])
            self._denoise(sample[rows], condition[rows], self.parameters(timestep.view(1)), part)
            out[rows] = part
        return out

    def _denoise(self, sample: Tensor, condition: Tensor, parameters: Tensor, out: Tensor) -> None:
        self._engine.denoise(
            sample=sample.data_ptr(), condition=condition.data_ptr(), parameters=parameters.data_ptr(),
            num_poses=len(sample), num_threads=torch.get_num_threads(), out=out.data_ptr(),
        )  # fmt: skip

    def sample(
        self,
        inputs: Tensor,
        table: StepTable,
        seed: int,
        frame_ids: Tensor,
        hypothesis_ids: Tensor,
        clip_sample_range: float | None,
    ) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``diffupose.ops.sample``, which checks the arguments."""
        inputs, coefficients = _plain(inputs), table.tensor().contiguous()
        scale = table.noise_scale_tensor()
        scale = None if scale is None else scale.contiguous()
        parameters = self.parameters(torch.from_numpy(table.timesteps))
        frame_ids, hypothesis_ids = frame_ids.contiguous(), hypothesis_ids.contiguous()
        out = torch.empty(len(frame_ids), len(hypothesis_ids), inputs.shape[1], 3, dtype=torch.float32)
        self._engine.sample(
            condition=inputs.data_ptr(), coefficients=coefficients.data_ptr(),
            noise_scale=0 if scale is None else scale.data_ptr(), parameters=parameters.data_ptr(),
            seed=seed - 2**64 if seed >= 2**63 else seed, frame_ids=frame_ids.data_ptr(),
            hypothesis_ids=hypothesis_ids.data_ptr(), clip=clip_sample_range,
            num_frames=len(frame_ids), num_hypotheses=len(hypothesis_ids), num_steps=len(table.timesteps),
            num_threads=torch.get_num_threads(), out=out.data_ptr(),
        )  # fmt: skip
        return out


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32).contiguous()


def _check_shape(name: str, value: Tensor, *shapes: list[int]) -> None:
    if list(value.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")


def check_shapes(layer: Layer, num_joints: int) -> None:
    """Raise unless the tensors of a layer fit each other: the engine reads as many numbers as it needs."""
    if isinstance(layer, GraphConv):
        if layer.weight.ndim != 3 or layer.weight.shape[0] != 2:
            raise ValueError(f"weight must have shape [2, C_in, C_out], got {tuple(layer.weight.shape)}")
        c_out = layer.weight.shape[2]
        _check_shape("own", layer.own, [num_joints, c_out])
        _check_shape("neighbors", layer.neighbors, [num_joints, c_out])
        _check_shape("adjacency", layer.adjacency, [num_joints, num_joints])
        _check_shape("bias", layer.bias, [c_out])
    elif isinstance(layer, Linear):
        if layer.weight.ndim != 2:
            raise ValueError(f"weight must have shape [C_in, C_out], got {tuple(layer.weight.shape)}")
        _check_shape("bias", layer.bias, [layer.weight.shape[1]], [num_joints, layer.weight.shape[1]])
