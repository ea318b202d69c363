"""Human3.6M from the two npz files that the research community shares: ``data_3d_h36m.npz``, ``data_2d_h36m_*.npz``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffupose.datasets.cameras_h36m import H36M_CAMERAS, H36MCamera, project, world_to_camera
from diffupose.datasets.unpickle import load_object_array
from diffupose.errors import InputError
from diffupose.skeleton import H36M_16, H36M_17, Skeleton, h36m_joints

TRAIN_SUBJECTS = ("S1", "S5", "S6", "S7", "S8")
TEST_SUBJECTS = ("S9", "S11")

_NUM_CAMERAS = 4
_NUM_RECORDED_JOINTS = 32
_KEPT_JOINTS = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)  # of 32, in the order of H36M_17
_MAX_METRES = 50.0  # people stay within a few metres of the world's origin; millimetres would be in the thousands

# Left joints, then right joints, as text: how a file without a layout name is recognised.
_SYMMETRY_LAYOUTS = {
    "[[4, 5, 6, 11, 12, 13], [1, 2, 3, 14, 15, 16]]": "h36m",
    "[[4, 5, 6, 10, 11, 12], [1, 2, 3, 13, 14, 15]]": "h36m",
    "[[1, 3, 5, 7, 9, 11, 13, 15], [2, 4, 6, 8, 10, 12, 14, 16]]": "coco",
    "[[3, 4, 5, 13, 14, 15], [0, 1, 2, 10, 11, 12]]": "mpii",
}


@dataclass(frozen=True, eq=False)
class H36MSequence:
    """One take seen by one camera; arrays are float32.

    Attributes:
        subject: For instance ``"S9"``.
        action: Full name of the take, for instance ``"Directions 1"``.
        camera_index: 0 to 3, the order of the files.
        camera: Its calibration.
        keypoints_2d: Pixels of shape ``[T, J, 2]``, or ``[T, J, 3]`` with a confidence.
        poses_3d: Poses of shape ``[T, J, 3]``, in metres, camera frame, root-relative.
        root: Joint 0, of shape ``[T, 3]``, in metres, camera frame.
    """

    subject: str
    action: str
    camera_index: int
    camera: H36MCamera
    keypoints_2d: np.ndarray
    poses_3d: np.ndarray
    root: np.ndarray

    @property
    def action_group(self) -> str:
        """Action without its number: ``"Directions"``. Scores are averaged over these 15."""
        return self.action.split(" ")[0]

    @property
    def name(self) -> str:
        """Subject, action and camera, as in error messages."""
        return _sequence_name(self.subject, self.action, self.camera)


def _sequence_name(subject: str, action: str, camera: H36MCamera) -> str:
    """Return the name of one sequence."""
    return f"{subject} / {action} / camera {camera.id}"


def _nested(path: str | os.PathLike[str], key: str) -> dict[str, dict[str, Any]]:
    """Read ``{subject: {action: ...}}``."""
    data = load_object_array(path, key)
    if not isinstance(data, dict) or not all(isinstance(actions, dict) for actions in data.values()):
        raise InputError(f"{key!r} in {os.fspath(path)!r} must be {{subject: {{action: array}}}}, got {type(data)}")
    return data


def _metadata(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read the 2D file's metadata; the HRNet file has none."""
    with np.load(path, allow_pickle=False) as archive:
        if "metadata" not in archive.files:
            return {}
    metadata = load_object_array(path, "metadata")
    return metadata if isinstance(metadata, dict) else {}


def _guess_layout(path: str | os.PathLike[str]) -> str:
    """Return the joint layout of a 2D file by its metadata, else by its name."""
    metadata = _metadata(path)
    if metadata.get("layout_name"):
        return str(metadata["layout_name"])
    symmetry = metadata.get("keypoints_symmetry")
    if isinstance(symmetry, (list, tuple)) and len(symmetry) == 2:
        # Stacked-hourglass files have no other mark, and "sh_ft_h36m" holds MPII's joints despite its name.
        sides = [np.asarray(side).tolist() for side in symmetry]
        return _SYMMETRY_LAYOUTS.get(str(sides), "unknown")
    stem = Path(path).stem.lower()
    if "coco" in stem:
        return "coco"
    return "mpii" if "mpii" in stem or "_sh_" in stem else "h36m"


def _check_layout(path: str | os.PathLike[str], layout: str | None) -> None:
    """Refuse 2D files whose joints are not Human3.6M's."""
    found = (layout or _guess_layout(path)).lower()
    if found != "h36m":
        raise InputError(
            f"{os.fspath(path)!r} has its joints in the layout {found!r}, not 'h36m': use a file with Human3.6M's "
            'joints, such as data_2d_h36m_cpn_ft_h36m_dbb.npz, or pass layout="h36m" where this is wrong'
        )


def _choose_subjects(subjects: Sequence[str] | None, poses: Mapping[str, Any], path: str) -> list[str]:
    """Return the subjects to read, those without 3D poses left out."""
    if isinstance(subjects, str):
        raise ValueError(f"subjects must be a sequence of names, got the text {subjects!r}")
    wanted = list(poses) if subjects is None else list(dict.fromkeys(subjects))
    unknown = [subject for subject in wanted if subject not in H36M_CAMERAS]
    if unknown:
        raise InputError(f"there are no published cameras for subjects {unknown}, only for {list(H36M_CAMERAS)}")
    absent = [subject for subject in wanted if subject not in poses]
    if len(absent) == len(wanted):
        raise InputError(f"none of the subjects {wanted} is in {path!r}, which holds {list(poses)}")
    if absent:
        warnings.warn(f"subjects {absent} are left out: {path!r} does not hold them", stacklevel=3)
    return [subject for subject in wanted if subject in poses]


def _check_actions(
    subjects: Sequence[str], poses: Mapping[str, Mapping[str, Any]], keypoints: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check that every take with 3D poses has 2D keypoints; takes with 2D alone are discarded ones."""
    missing, unused = [], []
    for subject in subjects:
        detected = keypoints.get(subject, {})
        missing += [f"{subject} / {action}" for action in poses[subject] if action not in detected]
        unused += [f"{subject} / {action}" for action in detected if action not in poses[subject]]
    if missing:
        rest = f"; the 2D file alone has {unused}" if unused else ""
        raise InputError(f"the 2D file lacks {missing}{rest}")


def _numbers(array: Any, name: str, joints: tuple[int, ...], channels: tuple[int, ...]) -> np.ndarray:
    """Check that this is an array ``[T, J, C]`` of numbers with one of these numbers of joints and channels."""
    is_numeric = isinstance(array, np.ndarray) and array.ndim == 3 and array.dtype.kind in "fiu"
    if is_numeric and array.shape[1] in joints and array.shape[2] in channels:
        return np.asarray(array)
    shape = f"[T, {' or '.join(map(str, joints))}, {' or '.join(map(str, channels))}]"
    got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
    raise InputError(f"{name} must be numbers of shape {shape}, got {got}")


def _views(views: Any, name: str) -> list[Any]:
    """Return a take's keypoints per camera."""
    is_list = isinstance(views, (list, tuple)) or (isinstance(views, np.ndarray) and views.ndim > 0)
    cameras = list(views) if is_list else []
    if len(cameras) != _NUM_CAMERAS:
        raise InputError(f"{name}: the 2D file must have a list of {_NUM_CAMERAS} cameras, got {len(cameras)}")
    return cameras


def _world_poses(positions: Any, name: str, skeleton: Skeleton) -> np.ndarray:
    """Check one take's 3D poses and return the skeleton's joints, ``[T, J, 3]`` in the world frame."""
    array = _numbers(positions, f"{name}: 3D poses", (_NUM_RECORDED_JOINTS, H36M_17.num_joints), (3,))
    array = array[:, _KEPT_JOINTS] if array.shape[1] == _NUM_RECORDED_JOINTS else array
    array = np.asarray(_drop_neck(array, skeleton), dtype=np.float64)  # [T, J, 3]
    if not np.isfinite(array).all():
        raise InputError(f"{name}: 3D poses must be finite")
    if array.size and np.abs(array).max() > _MAX_METRES:
        raise InputError(f"{name}: 3D poses must be in metres, got values up to {np.abs(array).max():.0f}")
    return array


def _detections(detections: Any, num_frames: int, name: str, skeleton: Skeleton) -> np.ndarray:
    """Check one sequence's keypoints and return the skeleton's joints, ``[T, J, 2 or 3]`` float32."""
    array = _numbers(detections, f"{name}: 2D keypoints", (H36M_16.num_joints, H36M_17.num_joints), (2, 3))
    if array.shape[1] < skeleton.num_joints:
        raise InputError(
            f"{name}: the 2D file has 16 joints (no Neck/Nose), the skeleton {skeleton.name} has 17: pass "
            "skeleton=H36M_16, or use a 2D file of 17 joints"
        )
    # Detections may have more frames than the poses, never fewer.
    if len(array) < num_frames:
        raise InputError(f"{name}: the 2D file has {len(array)} frames, the 3D file {num_frames}")
    array = _drop_neck(array[:num_frames], skeleton)
    return np.ascontiguousarray(array, dtype=np.float32)


def _drop_neck(joints: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """Leave Neck/Nose out of 17 joints where the skeleton has 16."""
    return joints if joints.shape[1] == skeleton.num_joints else joints[:, h36m_joints(skeleton.num_joints)]


def load_h36m(
    path_3d: str | os.PathLike[str],
    path_2d: str | os.PathLike[str] | None = None,
    *,
    subjects: Sequence[str] | None = None,
    skeleton: Skeleton = H36M_17,
    layout: str | None = None,
) -> list[H36MSequence]:
    """Return every take of Human3.6M as its four cameras see it, 2D and 3D side by side.

    The 3D poses are turned into each camera's frame, and joint 0 is subtracted. The files are read without running
    code from them. Takes that only the 2D file has are skipped; further frames in the 2D file are cut off.

    Args:
        path_3d: ``data_3d_h36m.npz``: ``positions_3d``, ``{subject: {action: [T, 32 or 17, 3]}}``, in metres, world
            frame.
        path_2d: ``data_2d_h36m_*.npz``: ``positions_2d``, ``{subject: {action: four [T', 17 or 16, 2 or 3]}}``, in
            pixels, with ``T' >= T``. None projects the 3D poses instead, which is the field's "ground-truth 2D".
        subjects: Names such as ``TEST_SUBJECTS``; those without 3D poses are left out with a warning. None takes all
            of the 3D file's.
        skeleton: ``H36M_17``, or ``H36M_16`` without Neck/Nose, which 16-joint detections need.
        layout: ``"h36m"`` where the 2D file's own metadata or name says otherwise and is wrong.

    Returns:
        Sequences ordered by subject, action and camera: pixels, and metres in the camera frame (x right, y down,
        z forward).

    Raises:
        InputError: If a file is damaged or not of this form, if no subject is left, if a take has no keypoints or too
            few frames, if poses are not in metres, or if the 2D joints are not Human3.6M's or fewer than the
            skeleton's. The message names the sequence.
        ValueError: If ``skeleton`` or ``subjects`` is not one of those above.
        OSError: If a file cannot be opened.

    Reference:
        Ionescu et al. 2014; Pavllo et al. 2019 (the files).
    """
    if skeleton not in (H36M_17, H36M_16):
        raise ValueError(f"skeleton must be H36M_17 or H36M_16, got {skeleton.name}")
    poses = _nested(path_3d, "positions_3d")
    chosen = _choose_subjects(subjects, poses, os.fspath(path_3d))
    keypoints: dict[str, dict[str, Any]] | None = None
    if path_2d is not None:
        keypoints = _nested(path_2d, "positions_2d")
        _check_layout(path_2d, layout)
        _check_actions(chosen, poses, keypoints)

    sequences = []
    for subject in chosen:
        cameras = H36M_CAMERAS[subject]
        for action, positions in poses[subject].items():
            world = _world_poses(positions, f"{subject} / {action}", skeleton)
            views = None if keypoints is None else _views(keypoints[subject][action], f"{subject} / {action}")
            for index, camera in enumerate(cameras):
                absolute = world_to_camera(world, camera)  # [T, J, 3]
                if views is None:
                    pixels = project(absolute, camera).astype(np.float32)  # [T, J, 2]
                else:
                    name = _sequence_name(subject, action, camera)
                    pixels = _detections(views[index], len(absolute), name, skeleton)
                sequences.append(
                    H36MSequence(
                        subject=subject,
                        action=action,
                        camera_index=index,
                        camera=camera,
                        keypoints_2d=pixels,
                        poses_3d=(absolute - absolute[:, :1]).astype(np.float32),
                        root=absolute[:, 0].astype(np.float32),
                    )
                )
    return sequences
