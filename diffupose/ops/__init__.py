"""The public ops: each checks its arguments, chooses a backend and runs it."""

from diffupose.ops._backend import available_backends
from diffupose.ops.denoise import PackedDenoiser
from diffupose.ops.hypothesis_statistics import HypothesisStatistics, hypothesis_statistics
from diffupose.ops.modulated_graph_conv import modulated_graph_conv
from diffupose.ops.philox_normal import INITIAL_NOISE_STEP, philox_normal
from diffupose.ops.reverse_step import reverse_step
from diffupose.ops.sample import sample

__all__ = [
    "INITIAL_NOISE_STEP",
    "HypothesisStatistics",
    "PackedDenoiser",
    "available_backends",
    "hypothesis_statistics",
    "modulated_graph_conv",
    "philox_normal",
    "reverse_step",
    "sample",
]
