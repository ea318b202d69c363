"""Keypoint files of common 2D detectors, read into one form that the lifter understands."""

from diffupose.keypoints.convert import HEAD_RULES, convert_keypoints
from diffupose.keypoints.layouts import LAYOUTS, Layout
from diffupose.keypoints.people import frame_ids
from diffupose.keypoints.read import read_keypoints
from diffupose.keypoints.types import Keypoints

__all__ = ["HEAD_RULES", "LAYOUTS", "Keypoints", "Layout", "convert_keypoints", "frame_ids", "read_keypoints"]
