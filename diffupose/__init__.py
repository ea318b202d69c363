"""diffupose: one 2D human pose in, many plausible 3D poses out."""

from diffupose.lift_result import LiftResult
from diffupose.lifter import Lifter

__version__ = "0.1.0"

__all__ = ["LiftResult", "Lifter", "__version__"]
