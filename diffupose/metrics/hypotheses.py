"""Sets of hypotheses: mean, covariance, the energy score, and the oracles that need the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.metrics._checks import MM_PER_M, check_hypotheses, check_hypotheses_pair
from diffupose.reference.hypothesis_statistics import covariance_of, mean_of

# Pairwise distances held at once by the energy score: 128 MiB in float64.
_MAX_PAIRS = 1 << 24


def mean_of_hypotheses(hypotheses: Tensor) -> Tensor:
    """Return the mean pose.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.

    Returns:
        Poses of shape ``[B, J, 3]``, in metres.

    Raises:
        ValueError: If the shape is not ``[B, H, J, 3]`` or the dtype is not float32 or float64.

    Example:
        >>> mean_of_hypotheses(torch.tensor([[[[0.0, 0.0, 1.0]], [[0.0, 0.0, 3.0]]]]))
        tensor([[[0., 0., 2.]]])
    """
    check_hypotheses(hypotheses)
    return mean_of(hypotheses)


def covariance_of_hypotheses(hypotheses: Tensor) -> Tensor:
    """Return the unbiased (N - 1) covariance of every joint.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.

    Returns:
        Matrices of shape ``[B, J, 3, 3]``, in square metres; NaN for fewer than 4 hypotheses, which cannot span 3D.

    Raises:
        ValueError: If the shape is not ``[B, H, J, 3]`` or the dtype is not float32 or float64.

    Example:
        >>> corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        >>> covariance_of_hypotheses(corners.reshape(1, 4, 1, 3))[0, 0, 0]  # variance 4 / (4 - 1)
        tensor([1.3333, 0.0000, 0.0000])
    """
    return covariance_of(hypotheses, mean_of_hypotheses(hypotheses))


def _errors(hypotheses: Tensor, target: Tensor) -> Tensor:
    """Return the error of every hypothesis and joint, shape ``[B, H, J]``, in millimetres."""
    hypotheses, target = check_hypotheses_pair(hypotheses, target)
    distance: Tensor = torch.linalg.vector_norm(hypotheses - target.unsqueeze(1), dim=-1)  # [B, H, J]
    return distance * MM_PER_M


def oracle_best_of_hypotheses(hypotheses: Tensor, target: Tensor) -> Tensor:
    """Return the MPJPE of the best hypothesis of each pose, chosen with the truth.

    An oracle: it falls with every further hypothesis and rewards too wide a spread. Report it beside the energy score.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.
        target: Poses of shape ``[B, J, 3]``, in metres.

    Returns:
        Errors of shape ``[B]``, in millimetres.

    Raises:
        ValueError: If the shapes do not fit or the dtype is not float32 or float64.

    Example:
        >>> oracle_best_of_hypotheses(torch.tensor([[[[0.0, 0.0, 1.0]], [[0.0, 0.0, 3.0]]]]), torch.zeros(1, 1, 3))
        tensor([1000.])

    Reference:
        Sharma et al. 2019; Wehrbein et al. 2021.
    """
    return _errors(hypotheses, target).mean(dim=-1).amin(dim=1)


def oracle_best_joint_of_hypotheses(hypotheses: Tensor, target: Tensor) -> Tensor:
    """Return the mean over joints of the error of each joint's own best hypothesis, chosen with the truth.

    An oracle, never above :func:`oracle_best_of_hypotheses`.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.
        target: Poses of shape ``[B, J, 3]``, in metres.

    Returns:
        Errors of shape ``[B]``, in millimetres.

    Raises:
        ValueError: If the shapes do not fit or the dtype is not float32 or float64.

    Example:
        >>> pair = torch.tensor([[[[0.0, 0, 1], [0, 0, 3]], [[0.0, 0, 3], [0, 0, 1]]]])
        >>> oracle_best_joint_of_hypotheses(pair, torch.zeros(1, 2, 3))
        tensor([1000.])

    Reference:
        Shan et al. 2023 (D3DP, J-Best).
    """
    return _errors(hypotheses, target).amin(dim=1).mean(dim=-1)


def energy_score(hypotheses: Tensor, target: Tensor) -> Tensor:
    """Return the energy score, a proper score of the whole set of hypotheses: smaller is better.

    ``mean_h |x_h - y| - 1/2 mean_{h != h'} |x_h - x_h'|`` per joint, averaged over joints. With one hypothesis there
    are no pairs and the score is the MPJPE. Memory stays bounded: frames are handled in chunks.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.
        target: Poses of shape ``[B, J, 3]``, in metres.

    Returns:
        Scores of shape ``[B]``, in millimetres.

    Raises:
        ValueError: If the shapes do not fit or the dtype is not float32 or float64.

    Example:
        >>> pair = torch.tensor([[[[0.0, 0.0, 1.0]], [[0.0, 0.0, 3.0]]]])  # mean error 2 m, half the distance 1 m
        >>> energy_score(pair, torch.zeros(1, 1, 3))
        tensor([1000.])

    Reference:
        Gneiting and Raftery 2007.
    """
    accuracy = _errors(hypotheses, target).mean(dim=(1, 2))
    count, joints = hypotheses.shape[1:3]
    if count == 1:
        return accuracy
    frames_per_chunk = max(1, _MAX_PAIRS // (joints * count * count))
    sums = []
    for chunk in torch.split(hypotheses, frames_per_chunk):
        points = chunk.transpose(1, 2)  # [b, J, H, 3]
        # The other mode of cdist goes through |a|^2 + |b|^2 - 2ab, which loses the digits of near hypotheses.
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # [b, J, H, H]
        sums.append(distances.sum(dim=(-2, -1)).mean(dim=-1))
    return accuracy - torch.cat(sums) * (0.5 * MM_PER_M / (count * (count - 1)))
