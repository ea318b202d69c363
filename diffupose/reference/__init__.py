"""Every op in plain PyTorch: what the fused code is tested against, and what runs where nothing is built."""

from diffupose.reference.philox_normal import philox_normal
from diffupose.reference.reverse_step import reverse_step
from diffupose.reference.sample import sample

__all__ = ["philox_normal", "reverse_step", "sample"]
