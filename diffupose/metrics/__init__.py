"""Metrics of 3D poses and of sets of hypotheses: poses in metres, errors in millimetres, shares in percent."""

from diffupose.metrics.accuracy import auc, mpjpe, mpjve, n_mpjpe, p_mpjpe, pck, per_joint_error
from diffupose.metrics.calibration import (
    DEFAULT_LEVELS,
    coverage,
    coverage_from_moments,
    dispersion,
    expected_calibration_error,
    region_level,
    spread_error_correlation,
)
from diffupose.metrics.hypotheses import (
    covariance_of_hypotheses,
    energy_score,
    mean_of_hypotheses,
    oracle_best_joint_of_hypotheses,
    oracle_best_of_hypotheses,
)

__all__ = [
    "DEFAULT_LEVELS",
    "auc",
    "covariance_of_hypotheses",
    "coverage",
    "coverage_from_moments",
    "dispersion",
    "energy_score",
    "expected_calibration_error",
    "mean_of_hypotheses",
    "mpjpe",
    "mpjve",
    "n_mpjpe",
    "oracle_best_joint_of_hypotheses",
    "oracle_best_of_hypotheses",
    "p_mpjpe",
    "pck",
    "per_joint_error",
    "region_level",
    "spread_error_correlation",
]
