"""diffupose: one 2D human pose in, many plausible 3D poses out."""

__version__ = "0.1.0"
