"""Calibration of the uncertainty: coverage of prediction regions, its error, dispersion and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffupose.metrics._checks import check_float, check_hypotheses_pair, check_poses, without_root
from diffupose.metrics.hypotheses import covariance_of_hypotheses, mean_of_hypotheses
from diffupose.reference.hypothesis_statistics import MIN_HYPOTHESES

DEFAULT_LEVELS: tuple[float, ...] = tuple(step / 20 for step in range(1, 20))
"""Levels 0.05, 0.10, ..., 0.95."""


def _check_scale(scale: Tensor | None, joints: int) -> Tensor:
    """Return the factors in float64 on the CPU, or raise ``ValueError`` unless there is one positive per joint."""
    if scale is None:
        return torch.ones(joints, dtype=torch.float64)
    if tuple(scale.shape) != (joints,):
        raise ValueError(f"scale must have shape [{joints}], got {tuple(scale.shape)}")
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"scale must be positive and finite, got {scale.tolist()}")
    return scale.cpu().double()


def _check_levels(levels: Sequence[float]) -> Tensor:
    """Return the levels as a float64 vector, or raise ``ValueError`` unless all lie strictly between 0 and 1."""
    values = torch.tensor([float(level) for level in levels], dtype=torch.float64)
    if len(values) == 0 or not bool(((values > 0) & (values < 1)).all()):
        raise ValueError(f"levels must lie strictly between 0 and 1, got {values.tolist()}")
    return values


def squared_distance(error: Tensor, covariance: Tensor) -> Tensor:
    """Return ``e^T C^-1 e``, shape ``[...]``, float64 on the CPU: infinite off the plane that a singular C spans.

    Variances, and errors where there is no variance, count as zero up to 3 eps of C's dtype times the largest variance.
    NaN where an entry is not finite.
    """
    precision = torch.finfo(covariance.dtype).eps
    # 3x3 decompositions in float64 on the CPU work for every device. They refuse NaN.
    error, covariance = error.cpu().double(), covariance.cpu().double()
    finite = covariance.isfinite().flatten(-2).all(dim=-1) & error.isfinite().all(dim=-1)
    covariance = torch.where(finite[..., None, None], covariance, torch.eye(3, dtype=torch.float64))
    variances, axes = torch.linalg.eigh(covariance)
    along = (error.unsqueeze(-2) @ axes).squeeze(-2).square()  # [..., 3], squared error along each axis
    floor = 3.0 * precision * variances[..., -1:].clamp(min=0.0)
    spread = variances > floor
    off_plane = torch.where(along > floor, torch.inf, 0.0)
    terms = torch.where(spread, along / torch.where(spread, variances, 1.0), off_plane)
    return torch.where(finite, terms.sum(dim=-1), torch.nan)


def level_of_distance(distance: Tensor, num_hypotheses: int) -> Tensor:
    """Return the level of Hotelling's region whose border lies at a squared distance, see ``region_level``."""
    from scipy.special import fdtr  # here, since importing SciPy takes time

    n = num_hypotheses
    return torch.as_tensor(fdtr(3.0, n - 3.0, (distance * (n * (n - 3) / (3.0 * (n * n - 1)))).numpy()))


def region_level(
    mean: Tensor, covariance: Tensor, target: Tensor, *, num_hypotheses: int, scale: Tensor | None = None
) -> Tensor:
    """Return the level of the smallest prediction region that contains the target.

    The region at level a is ``(y - m)^T C^-1 (y - m) <= 3 (N^2 - 1) / (N (N - 3)) F(3, N - 3; a)``: Hotelling's region
    for one further draw from the Gaussian whose N draws gave m and C. If the truth is such a draw, the result is
    uniform on 0..1. A singular C spans a plane, a line or a point. A target off it has level 1: it lies outside every
    region. A target on it is judged within it. A joint with neither spread nor error has level 0.

    Args:
        mean: Mean poses of shape ``[B, J, 3]``, in metres.
        covariance: Unbiased covariances of shape ``[B, J, 3, 3]``, in square metres.
        target: Poses of shape ``[B, J, 3]``, in metres.
        num_hypotheses: Number N of hypotheses behind mean and covariance.
        scale: Factors of shape ``[J]`` for the covariance; 1 if not given.

    Returns:
        Levels of shape ``[B, J]``, in dtype and on the device of ``target``; NaN where an input is not finite or N < 4.

    Raises:
        ValueError: If the shapes do not fit, N < 1, a factor is not positive, or a dtype is not float32 or float64.

    Example:
        >>> zeros, unit = torch.zeros(1, 1, 3), torch.eye(3).reshape(1, 1, 3, 3)
        >>> float(region_level(zeros, unit, zeros, num_hypotheses=10))
        0.0

    Reference:
        Hotelling 1931; Johnson and Wichern 2007, section 5.
    """
    check_poses("mean", mean, "[B, J, 3]", ndim=3)
    check_poses("target", target, "[B, J, 3]", ndim=3)
    if target.shape != mean.shape:
        raise ValueError(f"target must have the shape of mean {tuple(mean.shape)}, got {tuple(target.shape)}")
    if covariance.shape != (*mean.shape, 3):
        raise ValueError(f"covariance must have shape {[*mean.shape, 3]}, got {tuple(covariance.shape)}")
    check_float("covariance", covariance)
    if num_hypotheses < 1:
        raise ValueError(f"num_hypotheses must be at least 1, got {num_hypotheses}")
    factors = _check_scale(scale, mean.shape[1])
    if num_hypotheses < MIN_HYPOTHESES:
        return target.new_full(mean.shape[:2], torch.nan)
    distance = squared_distance(target - mean, covariance) / factors  # [B, J]
    return level_of_distance(distance, num_hypotheses).to(target)


def coverage_from_moments(
    mean: Tensor,
    covariance: Tensor,
    target: Tensor,
    *,
    num_hypotheses: int,
    levels: Sequence[float] = DEFAULT_LEVELS,
    scale: Tensor | None = None,
) -> Tensor:
    """Return how often the target lies in the region (``region_level``) of each level, from mean and covariance.

    Args:
        mean: Mean poses of shape ``[B, J, 3]``, in metres.
        covariance: Unbiased covariances of shape ``[B, J, 3, 3]``, in square metres.
        target: Poses of shape ``[B, J, 3]``, in metres.
        num_hypotheses: Number N of hypotheses behind mean and covariance.
        levels: L nominal levels, each strictly between 0 and 1.
        scale: Factors of shape ``[J]`` for the covariance; 1 if not given.

    Returns:
        Shares of shape ``[L, J]``, 0..1. Poses with a NaN in a joint are left out for that joint; NaN where
        none is left, and for N < 4.

    Raises:
        ValueError: If the shapes do not fit, a level or factor is out of range, or a dtype is not float32 or float64.

    Example:
        >>> zeros, unit = torch.zeros(1, 1, 3), torch.eye(3).reshape(1, 1, 3, 3)
        >>> coverage_from_moments(zeros, unit, zeros, num_hypotheses=10, levels=[0.5]).tolist()
        [[1.0]]
    """
    reached = region_level(mean, covariance, target, num_hypotheses=num_hypotheses, scale=scale)
    inside = torch.stack([(reached <= level).sum(dim=0) for level in _check_levels(levels).tolist()])  # [L, J]
    return inside.to(reached) / (~reached.isnan()).sum(dim=0)


def coverage(
    hypotheses: Tensor, target: Tensor, *, levels: Sequence[float] = DEFAULT_LEVELS, scale: Tensor | None = None
) -> Tensor:
    """Return how often the target lies in the prediction region (``region_level``) of each level.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.
        target: Poses of shape ``[B, J, 3]``, in metres.
        levels: L nominal levels, each strictly between 0 and 1.
        scale: Factors of shape ``[J]`` for the covariance; 1 if not given.

    Returns:
        Shares of shape ``[L, J]``, 0..1. Poses with a NaN in a joint are left out for that joint; NaN where
        none is left, and for fewer than 4 hypotheses.

    Raises:
        ValueError: If the shapes do not fit, a level or factor is out of range, or a dtype is not float32 or float64.

    Example:
        >>> hypotheses = torch.randn(100, 50, 17, 3)
        >>> coverage(hypotheses, torch.zeros(100, 17, 3)).shape
        torch.Size([19, 17])
    """
    hypotheses, target = check_hypotheses_pair(hypotheses, target)
    # In float64: the covariance of 4 or 5 draws is often so flat that it would be singular in float32.
    exact = hypotheses.cpu().double()
    mean, covariance, count = mean_of_hypotheses(exact), covariance_of_hypotheses(exact), exact.shape[1]
    reached = coverage_from_moments(
        mean, covariance, target.cpu().double(), num_hypotheses=count, levels=levels, scale=scale
    )
    return reached.to(target)


def expected_calibration_error(
    empirical: Tensor, levels: Sequence[float] = DEFAULT_LEVELS, *, root_joint: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the mean distance of empirical from nominal coverage, and that of the worst joint.

    Args:
        empirical: Coverage of shape ``[L, J]``, 0..1, as :func:`coverage` returns it.
        levels: The L nominal levels of ``empirical``.
        root_joint: Joint to leave out; it is zero in prediction and truth.

    Returns:
        Two scalars: the mean over levels and joints of ``|empirical - nominal|``, and the largest mean of one joint.

    Raises:
        ValueError: If ``empirical`` does not have shape ``[L, J]`` or a level or ``root_joint`` is out of range.

    Example:
        >>> mean, worst = expected_calibration_error(torch.tensor([[1.0, 0.5, 0.75]]), [0.5])
        >>> float(mean), float(worst)
        (0.125, 0.25)

    Reference:
        Kuleshov et al. 2018; Pierzchlewicz et al. 2022.
    """
    nominal = _check_levels(levels)
    if empirical.ndim != 2 or len(empirical) != len(nominal):
        raise ValueError(f"empirical must have shape [{len(nominal)}, J], got {tuple(empirical.shape)}")
    check_float("empirical", empirical)
    gap = (without_root(empirical, root_joint) - nominal.to(empirical).unsqueeze(1)).abs()  # [L, J - 1]
    per_joint = gap.mean(dim=0)
    return per_joint.mean(), per_joint.max()


def _error_and_spread(hypotheses: Tensor, target: Tensor, root_joint: int) -> tuple[Tensor, Tensor]:
    """Return squared error of the mean and trace of the covariance, each ``[K]``, of the finite non-root joints."""
    hypotheses, target = check_hypotheses_pair(hypotheses, target)
    squared_error = (mean_of_hypotheses(hypotheses) - target).square().sum(dim=-1)  # [B, J]
    variance = covariance_of_hypotheses(hypotheses).diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # [B, J]
    squared_error, variance = without_root(squared_error, root_joint), without_root(variance, root_joint)
    known = squared_error.isfinite() & variance.isfinite()
    return squared_error[known], variance[known]


def dispersion(hypotheses: Tensor, target: Tensor, *, root_joint: int = 0) -> Tensor:
    """Return the actual error divided by the error that the spread predicts; 1 is calibrated.

    ``RMS error of the mean / (sqrt(1 + 1/N) RMS spread)`` over poses and non-root joints. The spread is the root of the
    trace of the unbiased covariance. The value is 1 if the truth is one more draw from the distribution of the
    hypotheses. It is above 1 if the spread is too narrow.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.
        target: Poses of shape ``[B, J, 3]``, in metres.
        root_joint: Joint to leave out.

    Returns:
        A scalar without unit. Joints with a NaN are left out; NaN where none is left, and for fewer than 4 hypotheses.

    Raises:
        ValueError: If the shapes do not fit, ``root_joint`` is out of range, or a dtype is not float32 or float64.

    Example:
        >>> hypotheses, target = torch.randn(2000, 10, 2, 3), torch.randn(2000, 2, 3)
        >>> round(float(dispersion(hypotheses, target)), 0)
        1.0

    Reference:
        Fortin et al. 2014, spread and skill of ensembles.
    """
    squared_error, variance = _error_and_spread(hypotheses, target, root_joint)
    inflation = 1.0 + 1.0 / hypotheses.shape[1]
    return torch.sqrt(squared_error.mean() / (inflation * variance.mean()))


def _ranks(values: Tensor) -> Tensor:
    """Return ranks 1..K of a vector in float64, ties sharing the mean of their ranks."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    mean_rank: Tensor = sizes.cumsum(0).double() - 0.5 * (sizes.double() - 1.0)
    return mean_rank[group]


def spread_error_correlation(hypotheses: Tensor, target: Tensor, *, root_joint: int = 0) -> Tensor:
    """Return Spearman's rank correlation of predicted spread and actual error.

    The spread is the root of the trace of the unbiased covariance, the error that of the mean; pairs are taken over
    poses and non-root joints. Equal values share their mean rank.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.
        target: Poses of shape ``[B, J, 3]``, in metres.
        root_joint: Joint to leave out.

    Returns:
        A scalar in -1..1. Joints with a NaN are left out; NaN if fewer than two are left, if one of the two
        quantities is constant, and for fewer than 4 hypotheses.

    Raises:
        ValueError: If the shapes do not fit, ``root_joint`` is out of range, or a dtype is not float32 or float64.

    Example:
        >>> width = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
        >>> corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).reshape(1, 4, 1, 3)
        >>> hypotheses = (width * corners).expand(3, 4, 2, 3)  # joint 0 is the root
        >>> float(spread_error_correlation(hypotheses, width.squeeze(1).expand(3, 2, 3)))
        1.0

    Reference:
        Spearman 1904.
    """
    squared_error, variance = _error_and_spread(hypotheses, target, root_joint)
    # Ranks need no square root.
    error_rank, spread_rank = _ranks(squared_error.cpu()), _ranks(variance.cpu())
    error_rank, spread_rank = error_rank - error_rank.mean(), spread_rank - spread_rank.mean()
    product = (error_rank * spread_rank).sum()
    norm = (error_rank.square().sum() * spread_rank.square().sum()).sqrt()
    return torch.div(product, norm).to(target)
