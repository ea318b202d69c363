"""From pixels to 3D poses: the Lifter, its inputs and its results."""
