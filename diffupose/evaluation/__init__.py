"""Scores of a lifter on motion capture, and the fit of its uncertainty."""
