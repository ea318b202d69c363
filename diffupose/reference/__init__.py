"""Every op in plain PyTorch: what the fused code is tested against, and what runs where nothing is built."""

from diffupose.reference.philox_normal import philox_normal

__all__ = ["philox_normal"]
