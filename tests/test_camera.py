"""Camera geometry, against hand arithmetic, NumPy and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from diffupose.camera import (
    estimate_translation,
    normalize_screen_coordinates,
    person_box,
    project,
    quaternion_to_matrix,
    rotation_to_ray,
    split_intrinsics,
    undistort,
    viewing_ray,
)
from diffupose.datasets import cameras_h36m
from diffupose.datasets.cameras_h36m import H36M_CAMERAS

INTRINSICS = torch.tensor([[1100.0, 0.0, 510.0], [0.0, 1150.0, 495.0], [0.0, 0.0, 1.0]])


def exact_views(batch=3, hypotheses=1, joints=17, dtype=torch.float64, depth=5.0):
    """Return poses ``[B, H, J, 3]``, roots ``[B, 3]`` and the pixels of hypothesis 0, drawn in float64."""
    poses = 0.4 * torch.randn(batch, hypotheses, joints, 3, dtype=torch.float64)
    poses = poses - poses[:, :, :1]
    root = torch.randn(batch, 3, dtype=torch.float64) * torch.tensor([0.7, 0.4, 0.3]) + torch.tensor([0.0, 0.0, depth])
    focal, center = split_intrinsics(INTRINSICS.double().expand(batch, 3, 3))
    pixels = project(poses[:, 0] + root[:, None], focal, center)
    return poses.to(dtype), root.to(dtype), pixels.to(dtype)


class TestScreenCoordinates:
    def test_known_values(self):
        points = torch.tensor([[0.0, 0.0], [1000.0, 500.0], [500.0, 250.0], [250.0, 500.0]])
        expected = [[-1.0, -0.5], [1.0, 0.5], [0.0, 0.0], [-0.5, 0.5]]
        assert normalize_screen_coordinates(points, torch.tensor([1000.0, 500.0])).tolist() == expected

    def test_one_size_per_row(self):
        points = torch.tensor([[[100.0, 300.0]], [[100.0, 300.0]]])
        sizes = torch.tensor([[200.0, 400.0], [400.0, 400.0]]).unsqueeze(1)
        assert normalize_screen_coordinates(points, sizes).tolist() == [[[0.0, 1.0]], [[-0.5, 0.5]]]


class TestQuaternionToMatrix:
    def test_known_values(self):
        quarter_turn = quaternion_to_matrix(torch.tensor([1.0, 0.0, 0.0, 1.0]))  # about z, not normalised
        torch.testing.assert_close(
            quarter_turn, torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), atol=1e-6, rtol=0
        )

    def test_against_scipy(self):
        quaternion = torch.randn(4, 25, 4, dtype=torch.float64)
        expected = Rotation.from_quat(quaternion.reshape(-1, 4).numpy(), scalar_first=True).as_matrix()
        actual = quaternion_to_matrix(quaternion)
        assert actual.shape == (4, 25, 3, 3)
        np.testing.assert_allclose(actual.reshape(-1, 3, 3), expected, atol=1e-12)


class TestProject:
    def test_pinhole_known_values(self):
        points = torch.tensor([[[0.0, 0.0, 2.0], [1.0, -0.5, 4.0]]])
        pixels = project(points, torch.tensor([[1000.0, 800.0]]), torch.tensor([[500.0, 400.0]]))
        assert pixels.tolist() == [[[500.0, 400.0], [750.0, 300.0]]]

    def test_distortion_known_values(self):
        # u = (0.5, 0.25), r2 = 0.3125; radial 1 + 0.1 r2 = 1.03125; tangential 0.01 * 0.5 = 0.005; + p r2 in x
        points = torch.tensor([[[1.0, 0.5, 2.0]]], dtype=torch.float64)
        ones, zeros = torch.ones(1, 2).double(), torch.zeros(1, 2).double()
        pixels = project(points, ones, zeros, torch.tensor([[0.1, 0.0, 0.0]]), torch.tensor([[0.01, 0.0]]))
        torch.testing.assert_close(
            pixels, torch.tensor([[[0.5 * 1.03625 + 0.01 * 0.3125, 0.25 * 1.03625]]]).double(), atol=1e-8, rtol=0
        )

    @pytest.mark.parametrize("index", range(4))
    def test_against_numpy_within_the_image(self, index):
        camera = H36M_CAMERAS["S9"][index]
        points = np.random.default_rng(index).uniform((-2.0, -2.0, 3.0), (2.0, 2.0, 6.0), size=(400, 3))
        expected = cameras_h36m.project(points, camera)
        inside = ((expected > 0) & (expected < np.array(camera.size))).all(axis=1)
        assert inside.sum() > 100
        lens = (torch.tensor([getattr(camera, name)]).double() for name in ("focal", "center", "radial", "tangential"))
        actual = project(torch.from_numpy(points)[None], *lens)[0]
        np.testing.assert_allclose(actual[inside], expected[inside], atol=1e-4)

    @pytest.mark.parametrize("index", range(4))
    def test_undistort_is_the_inverse(self, index):
        """What a pinhole would have shown, for whatever projects into the image or a tenth beside it."""
        camera = H36M_CAMERAS["S9"][index]
        points = np.random.default_rng(index).uniform((-2.5, -2.5, 3.0), (2.5, 2.5, 6.0), size=(400, 3))
        lens = [torch.tensor([getattr(camera, name)]).double() for name in ("focal", "center", "radial", "tangential")]
        points = torch.from_numpy(points)[None]
        seen, pinhole = project(points, *lens), project(points, *lens[:2])
        size = torch.tensor(camera.size)
        near = ((seen > -0.1 * size) & (seen < 1.1 * size)).all(dim=-1)
        assert int(near.sum()) > 200
        assert float((undistort(seen, *lens) - pinhole)[near].abs().max()) < 1e-3
        assert float((seen - pinhole)[near].abs().max()) > 5.0
        seen[0, 0] = torch.nan
        assert undistort(seen, *lens)[0, 0].isnan().all()

    def test_distorted_points_far_outside_stay_outside(self):
        camera = H36M_CAMERAS["S9"][0]
        lens = (torch.tensor([getattr(camera, name)]) for name in ("focal", "center", "radial", "tangential"))
        pixels = project(torch.tensor([[[20.0, 0.0, 1.0], [0.0, -20.0, 1.0]]]), *lens)[0]
        assert pixels[0, 0] > camera.size[0] and pixels[1, 1] < 0


class TestRotationToRay:
    def test_turns_the_ray_to_the_axis(self):
        ray = torch.randn(6, 50, 3, dtype=torch.float64)
        ray[..., 2] = ray[..., 2].abs() + 0.05
        rotation = rotation_to_ray(ray)
        turned = (rotation @ ray.unsqueeze(-1)).squeeze(-1)
        expected = torch.zeros_like(ray)
        expected[..., 2] = ray.norm(dim=-1)
        torch.testing.assert_close(turned, expected, atol=1e-12, rtol=0)

    def test_is_the_smallest_rotation(self):
        ray = torch.randn(40, 3, dtype=torch.float64)
        ray[:, 2] = ray[:, 2].abs() + 0.05
        rotation = rotation_to_ray(ray)
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand(40, 3, 3))
        torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(40).double())
        angle = Rotation.from_matrix(rotation.numpy()).magnitude()
        np.testing.assert_allclose(angle, torch.acos(ray[:, 2] / ray.norm(dim=-1)), atol=1e-9)

    def test_axis_stays(self):
        assert torch.equal(rotation_to_ray(torch.tensor([0.0, 0.0, 3.0])), torch.eye(3))

    def test_float32_is_a_rotation(self):
        ray = viewing_ray(torch.rand(100, 2) * 1000, torch.full((100, 2), 1150.0), torch.full((100, 2), 500.0))
        rotation = rotation_to_ray(ray)
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(100, 3, 3), atol=1e-6, rtol=0)


class TestPersonBox:
    def test_known_values(self):
        keypoints = torch.tensor([[[0.0, 10.0], [4.0, 30.0], [1.0, 20.0]]])
        center, scale = person_box(keypoints, torch.ones(1, 3, dtype=torch.bool))
        assert center.tolist() == [[2.0, 20.0]]
        assert scale.tolist() == [[10.0]]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -1e9])
    def test_missing_joints_do_not_count(self, value):
        keypoints = torch.tensor(
            [[[0.0, 10.0], [40.0, 30.0], [value, value]], [[value, value], [3.0, 3.0], [9.0, 4.0]]]
        )
        present = torch.tensor([[True, True, False], [False, True, True]])
        center, scale = person_box(keypoints, present)
        assert center.tolist() == [[20.0, 20.0], [6.0, 3.5]]
        assert scale.tolist() == [[20.0], [3.0]]

    def test_one_point_has_a_scale(self):
        _, scale = person_box(torch.full((1, 3, 2), 7.0), torch.ones(1, 3, dtype=torch.bool))
        assert 0 < scale.item() <= 1e-5


def test_viewing_ray_and_intrinsics():
    focal, center = split_intrinsics(INTRINSICS)
    assert focal.tolist() == [1100.0, 1150.0] and center.tolist() == [510.0, 495.0]
    assert viewing_ray(torch.tensor([510.0, 1645.0]), focal, center).tolist() == [0.0, 1.0, 1.0]


class TestEstimateTranslation:
    def test_exact_data(self):
        poses, root, pixels = exact_views()
        estimated = estimate_translation(poses, pixels, torch.ones(3, 17).double(), INTRINSICS)
        torch.testing.assert_close(estimated, root[:, None], atol=1e-6, rtol=0)

    def test_missing_joints(self):
        poses, root, pixels = exact_views()
        confidence = torch.rand(3, 17).double() + 0.1
        confidence[0, 2:] = 0.0  # two joints are just enough
        confidence[1, 3] = confidence[2, 0] = 0.0
        pixels = torch.where(confidence.unsqueeze(-1) > 0, pixels, torch.nan)
        estimated = estimate_translation(poses, pixels, confidence, INTRINSICS.expand(3, 3, 3))
        torch.testing.assert_close(estimated, root[:, None], atol=1e-6, rtol=0)

    def test_against_lstsq(self):
        """Inexact keypoints, other cameras per row, several hypotheses: the weighted problem itself."""
        poses, _, pixels = exact_views(hypotheses=4)
        pixels += 20.0 * torch.randn_like(pixels)
        confidence = torch.rand(3, 17).double()
        confidence[:, 5] = 0.0
        intrinsics = INTRINSICS.double().repeat(3, 1, 1)
        intrinsics[1, 0, 0], intrinsics[2, 1, 2] = 900.0, 600.0
        estimated = estimate_translation(poses, pixels, confidence, intrinsics)
        for row in range(3):
            (fx, _, cx), (_, fy, cy), _ = intrinsics[row].numpy()
            u, v = (pixels[row, :, 0].numpy() - cx) / fx, (pixels[row, :, 1].numpy() - cy) / fy
            weight = np.sqrt(np.concatenate((confidence[row], confidence[row])))
            zero, one = np.zeros(17), np.ones(17)
            matrix = np.concatenate((np.stack((one, zero, -u), 1), np.stack((zero, one, -v), 1)))
            for number in range(4):
                x, y, z = poses[row, number].numpy().T
                right = np.concatenate((u * z - x, v * z - y))
                expected = np.linalg.lstsq(weight[:, None] * matrix, weight * right, rcond=None)[0]
                np.testing.assert_allclose(estimated[row, number], expected, rtol=1e-8)

    def test_weights_matter(self):
        poses, root, pixels = exact_views()
        pixels[:, 4] += 200.0  # an outlier
        trusting = torch.ones(3, 17).double()
        doubting = trusting.clone()
        doubting[:, 4] = 1e-3
        errors = [
            (estimate_translation(poses, pixels, weight, INTRINSICS)[:, 0] - root).norm(dim=-1)
            for weight in (trusting, doubting)
        ]
        assert (errors[0] > 10 * errors[1]).all()

    def test_scale_of_the_weights_does_not_matter(self):
        poses, _, pixels = exact_views(hypotheses=2)
        pixels += torch.randn_like(pixels)
        weight = torch.rand(3, 17).double()
        torch.testing.assert_close(
            estimate_translation(poses, pixels, weight, INTRINSICS),
            estimate_translation(poses, pixels, 1e-4 * weight, INTRINSICS),
        )

    def test_each_hypothesis_for_itself(self):
        poses, _, pixels = exact_views(hypotheses=5)
        weight = torch.ones(3, 17).double()
        together = estimate_translation(poses, pixels, weight, INTRINSICS)
        alone = [estimate_translation(poses[:, [n]], pixels, weight, INTRINSICS) for n in range(5)]
        torch.testing.assert_close(together, torch.cat(alone, dim=1))
        assert together.std(dim=1).min() > 1e-4

    def test_float32_accuracy(self):
        """A millimetre at 5 m: what is lost is the rounding of the pixels, not that of the solution."""
        poses, root, pixels = exact_views(batch=50, dtype=torch.float32)
        estimated = estimate_translation(poses, pixels, torch.ones(50, 17), INTRINSICS)
        assert estimated.dtype == torch.float32
        assert (estimated[:, 0] - root).abs().max() < 1e-4

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_joints(self, count):
        poses, root, pixels = exact_views(batch=2)
        confidence = torch.ones(2, 17).double()
        confidence[1, count:] = 0.0
        estimated = estimate_translation(poses, pixels, confidence, INTRINSICS)
        assert estimated[1].isnan().all()
        torch.testing.assert_close(estimated[0, 0], root[0], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("count", [2, 17])
    def test_joints_at_one_point(self, count):
        """Parallel rays meet nowhere: NaN, not the depth that rounding makes up."""
        poses, _, pixels = exact_views(batch=20, dtype=torch.float32)
        confidence = torch.zeros(20, 17)
        confidence[:, :count] = torch.rand(20, count) + 0.1
        pixels[:] = pixels[:, :1].clone()
        assert estimate_translation(poses, pixels, confidence, INTRINSICS).isnan().all()
        pixels[:, 1] += 1.0
        assert estimate_translation(poses, pixels, confidence, INTRINSICS).isfinite().all()

    def test_poses_of_nan(self):
        poses, root, pixels = exact_views(batch=2)
        poses[0] = torch.nan
        estimated = estimate_translation(poses, pixels, torch.ones(2, 17), INTRINSICS)
        assert estimated[0].isnan().all()
        torch.testing.assert_close(estimated[1, 0], root[1], atol=1e-6, rtol=0)
