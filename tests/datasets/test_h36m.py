"""Human3.6M's files, written here as the community writes them, and its cameras."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffupose.datasets.cameras_h36m import H36M_CAMERAS, H36MCamera, project, world_to_camera
from diffupose.datasets.h36m import TEST_SUBJECTS, TRAIN_SUBJECTS, load_h36m
from diffupose.errors import InputError
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15

CAMERA_IDS = ("54138969", "55011271", "58860488", "60457274")
ALL_CAMERAS = [
    pytest.param(camera, id=f"{subject}-{camera.id}") for subject, cameras in H36M_CAMERAS.items() for camera in cameras
]
ACTIONS = {"Directions": 4, "Directions 1": 5, "Walking": 6, "WalkDog": 3}
EXTRA_FRAMES = 2

# A person who stands at the world's origin facing +y, z up, in metres: joint of the 32 and its place.
STANDING = {
    0: (0.0, 0.0, 0.95), 1: (0.13, 0.0, 0.95), 2: (0.13, 0.0, 0.5), 3: (0.13, 0.0, 0.08), 6: (-0.13, 0.0, 0.95),
    7: (-0.13, 0.0, 0.5), 8: (-0.13, 0.0, 0.08), 12: (0.0, 0.0, 1.2), 13: (0.0, 0.0, 1.45), 14: (0.0, 0.08, 1.55),
    15: (0.0, 0.02, 1.68), 17: (-0.16, 0.0, 1.42), 18: (-0.2, 0.0, 1.15), 19: (-0.2, 0.05, 0.9),
    25: (0.16, 0.0, 1.42), 26: (0.2, 0.0, 1.15), 27: (0.2, 0.05, 0.9),
}  # fmt: skip
KEPT = sorted(STANDING)
HEAD, NECK = 10, 9


def standing(num_frames, offset=0.0):
    """Return 32-joint poses of shape [T, 32, 3] that walk along x; the joints to be dropped are far away."""
    poses = np.full((num_frames, 32, 3), 40.0, dtype=np.float32)
    for joint, place in STANDING.items():
        poses[:, joint] = place
    poses[:, KEPT, 0] += offset + 0.05 * np.arange(num_frames, dtype=np.float32)[:, None]
    return poses


def detections(num_frames, num_joints=17, channels=2, seed=0):
    """Return keypoints of shape [T, J, C], all different."""
    keypoints = np.random.default_rng(seed).uniform(0.0, 1000.0, (num_frames, num_joints, channels))
    return keypoints.astype(np.float32)


@pytest.fixture
def poses():
    return {
        subject: {action: standing(num_frames, 0.1 * index) for action, num_frames in ACTIONS.items()}
        for index, subject in enumerate(("S1", "S9"))
    }


@pytest.fixture
def path_3d(tmp_path, poses):
    np.savez_compressed(tmp_path / "data_3d_h36m.npz", positions_3d=poses)
    return tmp_path / "data_3d_h36m.npz"


@pytest.fixture
def write_2d(tmp_path):
    """Write a 2D file; ``change`` may edit its contents first."""

    def write(detector, num_joints=17, channels=2, metadata=None, change=None):
        positions = {
            subject: {
                action: [detections(num_frames + EXTRA_FRAMES, num_joints, channels, seed) for seed in range(4)]
                for action, num_frames in ACTIONS.items()
            }
            for subject in ("S1", "S2", "S9")  # S2 has detections and no poses
        }
        if change is not None:
            change(positions)
        path = tmp_path / f"data_2d_h36m_{detector}.npz"
        members = {"positions_2d": positions} if metadata is None else {"positions_2d": positions, "metadata": metadata}
        np.savez_compressed(path, **members)
        return path

    return write


H36M_METADATA = {
    "layout_name": "h36m",
    "num_joints": 17,
    "keypoints_symmetry": [[4, 5, 6, 11, 12, 13], [1, 2, 3, 14, 15, 16]],
}


def hamilton(a, b):
    """Return the product of two quaternions (w, x, y, z)."""
    return (
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    )


def seen_by(camera, point):
    """Return a world point in the camera's frame: the conjugate quaternion's rotation, in scalars."""
    w, x, y, z = camera.orientation
    shifted = (0.0, *(point[axis] - camera.translation[axis] for axis in range(3)))
    return hamilton(hamilton((w, -x, -y, -z), shifted), (w, x, y, z))[1:]


def pixel_of(camera, point):
    """Return the pixel of a point in the camera's frame, in scalars."""
    x, y = point[0] / point[2], point[1] / point[2]
    r2 = x**2 + y**2
    (k1, k2, k3), (p1, p2) = camera.radial, camera.tangential
    factor = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + p1 * x + p2 * y
    u, v = x * factor + p1 * r2, y * factor + p2 * r2
    return camera.focal[0] * u + camera.center[0], camera.focal[1] * v + camera.center[1]


class TestCameras:
    def test_known_values(self):
        # A quarter turn about z takes the camera's x axis to the world's y axis.
        half = math.sqrt(0.5)
        camera = H36MCamera(
            "1", (100, 100), (10.0, 20.0), (50.0, 60.0), (0.1, 0.01, 0.001), (0.2, 0.3), (half, 0, 0, half), (1, 2, 3)
        )
        np.testing.assert_allclose(world_to_camera(np.array([1.0, 4.0, 3.0]), camera), [2.0, 0.0, 0.0], atol=1e-12)
        # x = 1, y = 2, r2 = 5: factor = 1 + 0.5 + 0.25 + 0.125 + 0.2 + 0.6 = 2.675
        expected = [10.0 * (2.675 + 0.2 * 5.0) + 50.0, 20.0 * (5.35 + 0.3 * 5.0) + 60.0]
        np.testing.assert_allclose(project(np.array([2.0, 4.0, 2.0]), camera), expected)
        np.testing.assert_array_equal(camera.intrinsics, [[10.0, 0.0, 50.0], [0.0, 20.0, 60.0], [0.0, 0.0, 1.0]])

    def test_tables(self):
        assert set(H36M_CAMERAS) == {*TRAIN_SUBJECTS, *TEST_SUBJECTS}
        for cameras in H36M_CAMERAS.values():
            assert tuple(camera.id for camera in cameras) == CAMERA_IDS
            assert [camera.size for camera in cameras] == [(1000, 1002), (1000, 1000), (1000, 1000), (1000, 1002)]

    @pytest.mark.parametrize("camera", ALL_CAMERAS)
    def test_calibration_is_plausible(self, camera):
        assert math.isclose(sum(part**2 for part in camera.orientation), 1.0, abs_tol=1e-6)
        assert 3.0 < math.hypot(*camera.translation[:2]) < 6.0
        assert 1.3 < camera.translation[2] < 1.8
        assert all(1140.0 < focal < 1155.0 for focal in camera.focal)
        assert all(500.0 < center < 525.0 for center in camera.center)

    @pytest.mark.parametrize("camera", ALL_CAMERAS)
    def test_sees_a_standing_person_upright(self, camera):
        person = world_to_camera(standing(1)[0, KEPT], camera)
        assert (person[:, 2] > 2.0).all()
        pixels = project(person, camera)
        assert ((pixels > 0.0) & (pixels < camera.size)).all()
        assert person[HEAD, 1] < person[0, 1] < person[3, 1]  # y down: head, pelvis, foot
        assert pixels[HEAD, 1] < pixels[0, 1] < pixels[3, 1]

    @pytest.mark.parametrize("camera", ALL_CAMERAS)
    def test_agree_with_scalar_formulas(self, camera):
        points = np.random.default_rng(0).uniform(-1.0, 1.0, (20, 3))
        seen = world_to_camera(points.reshape(4, 5, 3), camera)
        assert seen.shape == (4, 5, 3)
        expected = np.array([seen_by(camera, point) for point in points.tolist()])
        np.testing.assert_allclose(seen.reshape(-1, 3), expected, atol=1e-5)  # the tables' quaternions have 7 digits
        pixels = project(seen, camera).reshape(-1, 2)
        np.testing.assert_allclose(pixels, [pixel_of(camera, point) for point in seen.reshape(-1, 3)], rtol=1e-12)

    def test_rotation_keeps_lengths(self):
        points = np.random.default_rng(0).normal(size=(50, 3))
        distances = np.linalg.norm(points[1:] - points[:-1], axis=-1)
        for cameras in H36M_CAMERAS.values():
            for camera in cameras:
                seen = world_to_camera(points, camera)
                np.testing.assert_allclose(np.linalg.norm(seen[1:] - seen[:-1], axis=-1), distances, rtol=1e-12)

    def test_points_behind_are_nan(self):
        points = np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        with np.errstate(all="raise"):
            pixels = project(points, H36M_CAMERAS["S9"][0])
        assert np.isnan(pixels).all(axis=-1).tolist() == [True, True, False]

    @pytest.mark.parametrize("function", [world_to_camera, project])
    def test_errors(self, function):
        with pytest.raises(ValueError, match=r"must have shape \[\.\.\., 3\], got \(4, 2\)"):
            function(np.zeros((4, 2)), H36M_CAMERAS["S9"][0])


class TestPoses:
    def test_shapes_and_order(self, path_3d):
        sequences = load_h36m(path_3d, subjects=("S9", "S1"))
        assert [(s.subject, s.action, s.camera_index) for s in sequences] == [
            (subject, action, index) for subject in ("S9", "S1") for action in ACTIONS for index in range(4)
        ]
        for sequence in sequences:
            num_frames = ACTIONS[sequence.action]
            assert sequence.camera is H36M_CAMERAS[sequence.subject][sequence.camera_index]
            assert sequence.poses_3d.shape == (num_frames, 17, 3)
            assert sequence.root.shape == (num_frames, 3)
            assert sequence.keypoints_2d.shape == (num_frames, 17, 2)
            assert {a.dtype for a in (sequence.poses_3d, sequence.root, sequence.keypoints_2d)} == {np.dtype("f4")}

    def test_grouping(self, path_3d):
        groups = {}
        for sequence in load_h36m(path_3d):
            groups.setdefault(sequence.action_group, set()).add(sequence.action)
        assert groups == {
            "Directions": {"Directions", "Directions 1"}, "Walking": {"Walking"}, "WalkDog": {"WalkDog"},
        }  # fmt: skip

    def test_all_subjects_by_default(self, path_3d):
        assert {sequence.subject for sequence in load_h36m(path_3d)} == {"S1", "S9"}

    def test_camera_frame_and_root(self, path_3d, poses):
        for sequence in load_h36m(path_3d):
            world = poses[sequence.subject][sequence.action].astype(float)
            assert not sequence.poses_3d[:, 0].any()
            assert (sequence.root[:, 2] > 0.0).all()
            assert (sequence.poses_3d[:, HEAD, 1] < 0.0).all()
            for joint, source in enumerate(KEPT):
                seen = seen_by(sequence.camera, world[-1, source])
                np.testing.assert_allclose(sequence.poses_3d[-1, joint] + sequence.root[-1], seen, atol=1e-5)

    def test_projection(self, path_3d):
        for sequence in load_h36m(path_3d):
            absolute = (sequence.poses_3d + sequence.root[:, None]).astype(float)
            for joint in range(17):
                expected = pixel_of(sequence.camera, absolute[-1, joint])
                np.testing.assert_allclose(sequence.keypoints_2d[-1, joint], expected, atol=1e-3)

    def test_17_joints_in_the_file(self, tmp_path, path_3d, poses):
        kept = {s: {a: array[:, KEPT] for a, array in actions.items()} for s, actions in poses.items()}
        np.savez_compressed(tmp_path / "kept.npz", positions_3d=kept)
        for one, other in zip(load_h36m(tmp_path / "kept.npz"), load_h36m(path_3d), strict=True):
            np.testing.assert_array_equal(one.poses_3d, other.poses_3d)

    def test_16_joints(self, path_3d):
        for one, other in zip(load_h36m(path_3d, skeleton=H36M_16), load_h36m(path_3d), strict=True):
            np.testing.assert_array_equal(one.poses_3d, np.delete(other.poses_3d, NECK, axis=1))
            np.testing.assert_array_equal(one.keypoints_2d, np.delete(other.keypoints_2d, NECK, axis=1))
            np.testing.assert_array_equal(one.root, other.root)

    def test_subjects_left_out(self, path_3d):
        with pytest.warns(UserWarning, match=r"\['S11'\] are left out"):
            sequences = load_h36m(path_3d, subjects=TEST_SUBJECTS)
        assert {sequence.subject for sequence in sequences} == {"S9"}

    def test_no_subject_left(self, path_3d):
        with pytest.raises(InputError, match=r"none of the subjects \['S5'\].*\['S1', 'S9'\]"):
            load_h36m(path_3d, subjects=("S5",))

    def test_subject_without_cameras(self, path_3d):
        with pytest.raises(InputError, match=r"no published cameras for subjects \['S2'\]"):
            load_h36m(path_3d, subjects=("S1", "S2"))

    def test_wrong_arguments(self, path_3d):
        with pytest.raises(ValueError, match="H36M_17 or H36M_16, got humaneva_15"):
            load_h36m(path_3d, skeleton=HUMANEVA_15)
        with pytest.raises(ValueError, match="sequence of names"):
            load_h36m(path_3d, subjects="S1")

    @pytest.mark.parametrize(
        ("take", "match"),
        [
            (1000.0 * standing(3), "must be in metres"),
            (standing(3)[:, :16], r"\[T, 32 or 17, 3\], got float32 \(3, 16, 3\)"),
            (standing(3) * np.nan, "must be finite"),
            ([1, 2], "got a list"),
        ],
        ids=["millimetres", "joints", "nan", "list"],
    )
    def test_wrong_poses(self, tmp_path, take, match):
        np.savez(tmp_path / "a.npz", positions_3d={"S1": {"Walking": take}})
        with pytest.raises(InputError, match=f"S1 / Walking: .*{match}"):
            load_h36m(tmp_path / "a.npz")

    def test_wrong_structure(self, tmp_path):
        np.savez(tmp_path / "a.npz", positions_3d=np.zeros((5, 17, 3)))
        with pytest.raises(InputError, match=r"must be {subject: {action: array}}"):
            load_h36m(tmp_path / "a.npz")

    def test_no_frames(self, tmp_path):
        np.savez(tmp_path / "a.npz", positions_3d={"S1": {"Walking": standing(0)}})
        assert [sequence.keypoints_2d.shape for sequence in load_h36m(tmp_path / "a.npz")] == [(0, 17, 2)] * 4


class TestDetections:
    @pytest.mark.parametrize("metadata", [H36M_METADATA, None, {"num_joints": 17}], ids=["h36m", "none", "bare"])
    def test_are_cut_to_the_poses(self, path_3d, write_2d, metadata):
        path_2d = write_2d("cpn_ft_h36m_dbb", metadata=metadata)
        sequences = load_h36m(path_3d, path_2d)
        assert {sequence.subject for sequence in sequences} == {"S1", "S9"}
        assert len(sequences) == 2 * len(ACTIONS) * 4
        for sequence in sequences:
            num_frames = ACTIONS[sequence.action]
            expected = detections(num_frames + EXTRA_FRAMES, seed=sequence.camera_index)[:num_frames]
            np.testing.assert_array_equal(sequence.keypoints_2d, expected)

    def test_layout_by_symmetry_alone(self, path_3d, write_2d):
        # The ground-truth file's metadata names no layout.
        path_2d = write_2d("gt", metadata={"keypoints_symmetry": H36M_METADATA["keypoints_symmetry"]})
        assert len(load_h36m(path_3d, path_2d)) == 2 * len(ACTIONS) * 4

    def test_confidence(self, path_3d, write_2d):
        path_2d = write_2d("detectron_ft_h36m", channels=3, metadata=H36M_METADATA)
        for skeleton in (H36M_17, H36M_16):
            for sequence in load_h36m(path_3d, path_2d, skeleton=skeleton):
                shape = (ACTIONS[sequence.action], skeleton.num_joints, 3)
                assert sequence.keypoints_2d.shape == shape

    def test_16_of_17_joints(self, path_3d, write_2d):
        path_2d = write_2d("cpn_ft_h36m_dbb", metadata=H36M_METADATA)
        for sequence in load_h36m(path_3d, path_2d, skeleton=H36M_16):
            num_frames = ACTIONS[sequence.action]
            expected = detections(num_frames + EXTRA_FRAMES, seed=sequence.camera_index)[:num_frames]
            np.testing.assert_array_equal(sequence.keypoints_2d, np.delete(expected, NECK, axis=1))
            assert sequence.poses_3d.shape == (num_frames, 16, 3)

    def test_hr(self, path_3d, write_2d):
        path_2d = write_2d("hr", num_joints=16)
        for sequence in load_h36m(path_3d, path_2d, skeleton=H36M_16):
            num_frames = ACTIONS[sequence.action]
            expected = detections(num_frames + EXTRA_FRAMES, 16, seed=sequence.camera_index)[:num_frames]
            np.testing.assert_array_equal(sequence.keypoints_2d, expected)
            assert sequence.poses_3d.shape == (num_frames, 16, 3)
        with pytest.raises(InputError, match=r"16 joints .*pass skeleton=H36M_16"):
            load_h36m(path_3d, path_2d)

    @pytest.mark.parametrize(
        ("detector", "metadata", "layout"),
        [
            ("detectron_pt_coco", {"layout_name": "coco"}, "coco"),
            ("detectron_pt_coco", None, "coco"),
            ("any", {"layout_name": "mpii"}, "mpii"),
            ("sh_ft_h36m", {"keypoints_symmetry": [[3, 4, 5, 13, 14, 15], [0, 1, 2, 10, 11, 12]]}, "mpii"),
            ("sh_ft_h36m", None, "mpii"),
            ("any", {"keypoints_symmetry": [[1], [2]]}, "unknown"),
        ],
    )
    def test_other_layouts(self, path_3d, write_2d, detector, metadata, layout):
        path_2d = write_2d(detector, metadata=metadata)
        with pytest.raises(InputError, match=rf"{detector}\.npz' has its joints in the layout '{layout}', not 'h36m'"):
            load_h36m(path_3d, path_2d)
        assert load_h36m(path_3d, path_2d, layout="h36m")

    def test_too_few_frames(self, path_3d, write_2d):
        def shorten(positions):
            positions["S9"]["Walking"][2] = detections(5)

        path_2d = write_2d("cpn", change=shorten)
        match = "S9 / Walking / camera 58860488: the 2D file has 5 frames, the 3D file 6"
        with pytest.raises(InputError, match=match):
            load_h36m(path_3d, path_2d)
        assert load_h36m(path_3d, path_2d, subjects=("S1",))

    def test_missing_takes(self, path_3d, write_2d):
        def rename(positions):
            positions["S1"]["WalkingDog"] = positions["S1"].pop("WalkDog")
            del positions["S9"]["Directions 1"]

        path_2d = write_2d("cpn", change=rename)
        match = r"lacks \['S1 / WalkDog', 'S9 / Directions 1'\]; the 2D file alone has \['S1 / WalkingDog'\]"
        with pytest.raises(InputError, match=match):
            load_h36m(path_3d, path_2d)

    def test_takes_without_poses_are_skipped(self, path_3d, write_2d):
        def add(positions):
            positions["S9"]["Phoning"] = [detections(4)] * 4

        sequences = load_h36m(path_3d, write_2d("cpn", change=add))
        assert {sequence.action for sequence in sequences} == set(ACTIONS)

    @pytest.mark.parametrize(
        ("views", "match"),
        [
            ([detections(9)] * 3, "S1 / Walking: the 2D file must have a list of 4 cameras, got 3"),
            (None, "S1 / Walking: the 2D file must have a list of 4 cameras"),
            ([detections(9, 15)] * 4, r"\[T, 16 or 17, 2 or 3\], got float32 \(9, 15, 2\)"),
            ([detections(9, 17, 4)] * 4, r"got float32 \(9, 17, 4\)"),
            ([None] * 4, "S1 / Walking / camera 54138969: .*got a NoneType"),
        ],
        ids=["three cameras", "none", "joints", "channels", "no array"],
    )
    def test_wrong_detections(self, path_3d, write_2d, views, match):
        def replace(positions):
            positions["S1"]["Walking"] = views

        path_2d = write_2d("cpn", change=replace)
        with pytest.raises(InputError, match=match):
            load_h36m(path_3d, path_2d)

    def test_hostile_file(self, tmp_path, path_3d):
        np.savez(tmp_path / "a.npz", positions_2d={"S1": print})
        with pytest.raises(InputError, match=r"builtins\.print"):
            load_h36m(path_3d, tmp_path / "a.npz")
