"""Filling missing joints by the mean pose."""

from __future__ import annotations

import math

import pytest
import torch

from diffupose.mean_pose import fill_missing_joints, mean_pose_2d
from diffupose.skeleton import H36M_16, H36M_17


def similar(num_joints, batch=8, dtype=torch.float64):
    """Return the mean pose turned, scaled and moved, ``[B, J, 2]``."""
    pose = mean_pose_2d(num_joints).to(dtype)
    angle = torch.rand(batch, dtype=dtype) * 2 * math.pi
    scale = torch.rand(batch, dtype=dtype) * 400 + 20
    rotation = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), dim=-1).unflatten(-1, (2, 2))
    return scale[:, None, None] * pose @ rotation + torch.rand(batch, 1, 2, dtype=dtype) * 1000


@pytest.mark.parametrize("skeleton", [H36M_17, H36M_16], ids=lambda skeleton: skeleton.name)
def test_mean_pose_is_a_person(skeleton):
    pose = mean_pose_2d(skeleton.num_joints)
    assert pose.shape == (skeleton.num_joints, 2)
    names = list(skeleton.joint_names)
    height = [pose[names.index(name), 1].item() for name in ("Head", "Thorax", "Spine", "LKnee", "LFoot")]
    assert height == sorted(height)  # y down
    mirrored = pose[list(skeleton.flip_permutation)] * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(mirrored, pose)
    assert pose.abs().max() <= 1.0


def test_sixteen_joints_are_those_without_the_neck():
    assert torch.equal(mean_pose_2d(16), mean_pose_2d(17)[[j for j in range(17) if j != 9]])


@pytest.mark.parametrize("num_joints", [17, 16])
@pytest.mark.parametrize("num_missing", [1, 5, 8])
def test_exact_for_a_similarity_of_the_mean_pose(num_joints, num_missing):
    expected = similar(num_joints)
    present = torch.rand(8, num_joints).argsort(dim=1) >= num_missing
    given = torch.where(present.unsqueeze(-1), expected, torch.nan)
    torch.testing.assert_close(fill_missing_joints(given, present), expected, atol=1e-8, rtol=0)


def test_two_joints_are_enough():
    expected = similar(17)
    present = torch.zeros(8, 17, dtype=torch.bool)
    present[:, [3, 10]] = True
    torch.testing.assert_close(fill_missing_joints(expected * present[..., None], present), expected)


def test_present_joints_are_unchanged():
    keypoints = torch.rand(20, 17, 2) * 1000
    present = torch.rand(20, 17) > 0.3
    filled = fill_missing_joints(torch.where(present.unsqueeze(-1), keypoints, torch.nan), present)
    assert torch.equal(filled[present], keypoints[present])
    assert filled.isfinite().all() and filled.dtype == torch.float32


def test_least_squares():
    """No other similarity brings the mean pose nearer to the present joints."""
    keypoints = similar(17) + 15.0 * torch.randn(8, 17, 2).double()
    present = torch.ones(8, 17, dtype=torch.bool)
    present[:, [2, 13]] = False
    pose = mean_pose_2d(17).double()
    x, y = pose[:, 0], pose[:, 1]
    one, zero = torch.ones(17).double(), torch.zeros(17).double()
    # (x, y) -> (a x - b y + c, b x + a y + d) is linear in a, b, c, d.
    matrix = torch.cat((torch.stack((x, -y, one, zero), 1), torch.stack((y, x, zero, one), 1)))
    filled = fill_missing_joints(keypoints, present)
    for row in range(8):
        seen = torch.cat((present[row], present[row]))
        right = keypoints[row].T.flatten()
        solution = torch.linalg.lstsq(matrix[seen], right[seen, None]).solution
        expected = (matrix @ solution).reshape(2, 17).T
        torch.testing.assert_close(filled[row][~present[row]], expected[~present[row]])


@pytest.mark.parametrize("num_joints", [15, 18])
def test_errors(num_joints):
    with pytest.raises(ValueError, match=f"16 or 17 joints, got {num_joints}"):
        fill_missing_joints(torch.zeros(1, num_joints, 2), torch.ones(1, num_joints, dtype=torch.bool))
