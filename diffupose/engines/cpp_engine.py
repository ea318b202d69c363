"""The C++ engine: the whole denoiser, and the whole reverse process, in one call on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffupose.engines.engine import Precision, ProgramEngine, SampleRequest, addresses_of, check_precision
from diffupose.engines.layer_program import Attention, GraphConv, LayerProgram, Linear, ScaleShift
from diffupose.ops._backend import Backend, cpp
from diffupose.ops.philox_normal import signed


class PackedDenoiser(ProgramEngine):
    """A denoiser whose weights lie as the C++ engine reads them, for one instruction set and one precision.

    Args:
        program: The layers.
        precision: ``"float32"`` or ``"bfloat16"``, which rounds weights and activations of every product; fast on
            processors with AVX512-BF16 only.

    Raises:
        BackendUnavailableError: If there is no C++ extension.
        ValueError: If the precision is unknown, or the engine cannot run the program.
    """

    backend: Backend = "cpp"
    # Memory does not grow with the number of hypotheses, but a progress bar moves between two calls.
    max_hypotheses = 4096

    def __init__(self, program: LayerProgram, precision: Precision = "float32") -> None:
        check_precision(precision)
        engine = cpp().Engine(program.num_joints, list(program.widths), precision == "bfloat16")
        super().__init__(program, precision, engine.padded)
        for layer in program.layers:
            _ADD[type(layer)](engine, layer, self._slots)
        self._engine = engine

    @property
    def isa(self) -> str:
        """The instruction set that it was packed for."""
        return self._engine.isa

    @property
    def name(self) -> str:
        """What runs, for people."""
        return f"cpp {self.isa}"

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        return self._engine.weight_bytes

    def _place(self, value: Tensor) -> Tensor:
        return _plain(value)

    def _denoise(self, sample: Tensor, condition: Tensor, parameters: Tensor, out: Tensor) -> None:
        self._engine.denoise(
            sample=sample.data_ptr(), condition=condition.data_ptr(), parameters=parameters.data_ptr(),
            num_poses=len(sample), num_threads=torch.get_num_threads(), out=out.data_ptr(),
        )  # fmt: skip

    def sample(self, request: SampleRequest) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``Engine.sample``."""
        table, scale = request.table, request.table.noise_scale_tensor()
        tensors = {
            "condition": _plain(request.condition),
            "coefficients": table.tensor().contiguous(),
            "parameters": self.parameters(torch.from_numpy(table.timesteps)),
            "frame_ids": request.frame_ids.contiguous(),
            "hypothesis_ids": request.hypothesis_ids.contiguous(),
            "noise_scale": None if scale is None else scale.contiguous(),
        }
        out = torch.empty(request.shape, dtype=torch.float32)
        self._engine.sample(
            **addresses_of(tensors), out=out.data_ptr(), seed=signed(request.seed), clip=request.clip_sample_range,
            num_frames=request.shape[0], num_hypotheses=request.shape[1], num_steps=len(table.timesteps),
            num_threads=torch.get_num_threads(),
        )  # fmt: skip
        return out


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32).contiguous()


# The engine copies what it is given: tensors need to live for the call only.
_Slots = list[tuple[int, int, int]]


def _add_graph_conv(engine: Any, layer: GraphConv, slots: _Slots) -> None:
    c_in, c_out = layer.widths()
    tensors = {
        "weight": torch.cat((layer.weight[0], layer.weight[1]), dim=-1),  # [C_in, 2 C_out]
        "own": layer.own,
        "neighbors": layer.neighbors,
        "adjacency": layer.adjacency,
        "bias": layer.bias,
    }
    plain = {name: _plain(tensor) for name, tensor in tensors.items()}
    engine.add_graph_conv(
        input=layer.input, output=layer.output, residual=layer.residual, activation=layer.activation, c_in=c_in,
        c_out=c_out, **addresses_of(plain),
    )  # fmt: skip


def _add_linear(engine: Any, layer: Linear, slots: _Slots) -> None:
    weight, bias = _plain(layer.weight), _plain(layer.bias)
    engine.add_linear(
        input=layer.input, output=layer.output, residual=layer.residual, c_in=weight.shape[0], c_out=weight.shape[1],
        weight=weight.data_ptr(), bias=bias.data_ptr(), bias_per_joint=bias.ndim == 2,
    )  # fmt: skip


def _add_scale_shift(engine: Any, layer: ScaleShift, slots: _Slots) -> None:
    engine.add_scale_shift(
        input=layer.input, output=layer.output, normalize=layer.normalize, eps=layer.eps, channels=layer.channels,
        offset=slots[layer.slot][0],
    )  # fmt: skip


def _add_attention(engine: Any, layer: Attention, slots: _Slots) -> None:
    engine.add_attention(
        input=layer.input, output=layer.output, num_heads=layer.num_heads, channels=layer.channels
    )  # fmt: skip


_ADD: dict[type, Callable[[Any, Any, _Slots], None]] = {
    GraphConv: _add_graph_conv,
    Linear: _add_linear,
    ScaleShift: _add_scale_shift,
    Attention: _add_attention,
}
