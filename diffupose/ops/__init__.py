"""The public ops: each checks its arguments, chooses a backend and runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffupose.ops._backend import available_backends
from diffupose.ops.hypothesis_statistics import HypothesisStatistics, hypothesis_statistics
from diffupose.ops.modulated_graph_conv import modulated_graph_conv
from diffupose.ops.philox_normal import INITIAL_NOISE_STEP, philox_normal
from diffupose.ops.reverse_step import reverse_step

if TYPE_CHECKING:
    from diffupose.engines.cpp_engine import PackedDenoiser
    from diffupose.engines.sample import sample

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


def __getattr__(name: str) -> object:
    # Engines stand above the ops and import them: these two names are looked up when they are asked for.
    if name == "PackedDenoiser":
        from diffupose.engines.cpp_engine import PackedDenoiser

        return PackedDenoiser
    if name == "sample":
        from diffupose.engines.sample import sample

        return sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
