"""diffupose: one 2D human pose in, many plausible 3D poses out."""

from diffupose._version import __version__
from diffupose.lifting.lifter import Lifter
from diffupose.lifting.result import LiftResult

__all__ = ["LiftResult", "Lifter", "__version__"]
