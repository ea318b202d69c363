"""Every op in plain PyTorch: the specification that other backends are tested against, and their fallback."""

from diffupose.reference.hypothesis_statistics import hypothesis_statistics
from diffupose.reference.modulated_graph_conv import modulated_graph_conv
from diffupose.reference.philox_normal import philox_normal
from diffupose.reference.reverse_step import reverse_step
from diffupose.reference.sample import sample

__all__ = ["hypothesis_statistics", "modulated_graph_conv", "philox_normal", "reverse_step", "sample"]
