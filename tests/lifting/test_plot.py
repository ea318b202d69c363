"""Tests of the picture: it is written whole, shows what it is given, and says what it cannot draw."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffupose.lifting.plot import depth_spread, plot_poses
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15, Skeleton

# A person facing the camera, arms out: x right, y down, metres, the pelvis at 0. The left is on the image's right.
STICK_FIGURE = {
    "Hip": (0.0, 0.0), "RHip": (-0.13, 0.0), "RKnee": (-0.15, 0.45), "RFoot": (-0.16, 0.88), "LHip": (0.13, 0.0),
    "LKnee": (0.15, 0.45), "LFoot": (0.16, 0.88), "Spine": (0.0, -0.24), "Thorax": (0.0, -0.5),
    "Neck/Nose": (0.0, -0.62), "Head": (0.0, -0.74), "LShoulder": (0.16, -0.46), "LElbow": (0.4, -0.42),
    "LWrist": (0.62, -0.5), "RShoulder": (-0.16, -0.46), "RElbow": (-0.4, -0.42), "RWrist": (-0.62, -0.5),
}  # fmt: skip


def make_people(
    count: int = 1, num_hypotheses: int = 5, skeleton: Skeleton = H36M_17
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keypoints, hypotheses that differ in depth alone, and their mean."""
    plane = np.array([STICK_FIGURE[name] for name in skeleton.joint_names])  # [J, 2]
    keypoints = np.repeat((300.0 * plane + [640.0, 360.0])[None], count, axis=0)  # [B, J, 2]
    depth = np.linspace(-1.0, 1.0, num_hypotheses)[:, None] if num_hypotheses > 1 else np.zeros((1, 1))
    reach = np.abs(plane[:, 0])  # [J]
    hypotheses = np.zeros((count, num_hypotheses, skeleton.num_joints, 3))
    hypotheses[..., :2] = plane
    hypotheses[..., 2] = 0.3 * depth * reach  # [H, J]
    return keypoints, hypotheses, hypotheses.mean(axis=1)


def png_size(path: Path) -> tuple[int, int]:
    """Return width and height from the header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def svg_text(tmp_path: Path, *args, **kwargs) -> list[str]:
    """Return the texts of the picture: matplotlib leaves each as a comment beside its outlines."""
    path = tmp_path / "texts.svg"
    plot_poses(path, *args, **kwargs)
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip()[5:-4] for line in lines if line.strip().startswith("<!-- ")]


@pytest.mark.parametrize("skeleton", [H36M_17, H36M_16], ids=lambda skeleton: skeleton.name)
@pytest.mark.parametrize("num_hypotheses", [1, 2, 200])
def test_png(tmp_path, skeleton, num_hypotheses):
    path = tmp_path / "poses.png"
    plot_poses(path, *make_people(1, num_hypotheses, skeleton), skeleton)
    width, height = png_size(path)
    assert width == 1650  # 11 inches at 150 dpi
    assert 500 < height < 900
    image = picture(path)[..., :3]
    assert (image[0] == 1).all()  # white paper
    assert 0.001 < (image < 0.9).any(-1).mean() < 0.2  # something is drawn and most of the paper is empty
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")])
def test_formats(tmp_path, suffix, start):
    path = tmp_path / f"poses{suffix}"
    plot_poses(str(path), *make_people(), H36M_17)
    assert path.read_bytes().startswith(start)


def test_rows_make_the_picture_taller(tmp_path):
    heights = []
    for count in (1, 2, 3):
        plot_poses(tmp_path / "poses.png", *make_people(count), H36M_17)
        heights.append(png_size(tmp_path / "poses.png")[1])
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=2)
    assert heights[1] - heights[0] > 300


def test_every_input_is_drawn(tmp_path):
    def draw(keypoints, hypotheses, poses_3d):
        plot_poses(tmp_path / "poses.png", keypoints, hypotheses, poses_3d, H36M_17)
        return picture(tmp_path / "poses.png")

    base = draw(*make_people())
    np.testing.assert_array_equal(base, draw(*make_people()))
    third = base.shape[1] // 3
    for which in range(3):
        people = make_people()
        moved = people[which]
        if which == 0:
            moved[0, 13] = np.nan  # the left wrist of the input
        else:
            moved[..., 13, 2] -= 0.05  # the left wrist, in depth
        changed = (base != draw(*people)).any(axis=(0, 2))
        # Hypotheses and aggregate: depth is seen from the side alone.
        expected = [which == 0, False, which > 0]
        assert [bool(changed[column * third : (column + 1) * third].any()) for column in range(3)] == expected


def test_left_and_right_have_their_colors(tmp_path):
    plot_poses(tmp_path / "poses.png", *make_people(), H36M_17)
    image = picture(tmp_path / "poses.png")[:, :, :3]
    below_header = image[int(0.9 * 150) :, : image.shape[1] // 3]
    blue = np.abs(below_header - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    orange = np.abs(below_header - np.array([0xE0, 0x6C, 0x00]) / 255).max(-1) < 0.02
    # The person faces the camera, so that the person's left is on the right of the picture.
    assert np.nonzero(blue)[1].min() > np.nonzero(orange)[1].max()


def test_view_from_the_side(tmp_path):
    keypoints, hypotheses, poses_3d = make_people()
    left = list(H36M_17.joints_left)
    hypotheses[:, :, left, 2] = poses_3d[:, left, 2] = 0.6  # metres farther away than the rest
    plot_poses(tmp_path / "poses.png", keypoints, hypotheses, poses_3d, H36M_17)
    image = picture(tmp_path / "poses.png")[:, :, :3]
    side = image[int(0.9 * 150) :, 2 * image.shape[1] // 3 :]
    blue = np.abs(side - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    orange = np.abs(side - np.array([0xE0, 0x6C, 0x00]) / 255).max(-1) < 0.02
    assert np.nonzero(blue)[1].mean() > np.nonzero(orange)[1].mean() + 50
    assert np.nonzero(blue)[0].min() < side.shape[0] / 3  # the hands are up


def test_texts(tmp_path):
    texts = svg_text(tmp_path, *make_people(2), H36M_17, labels=["Ada & Eve", "Grace"])
    assert {"input keypoints", "front", "side", "left of the person", "right of the person", "aggregate"} <= set(texts)
    assert {"5 hypotheses", "Grace", "0.5 m"} <= set(texts)
    assert sum("away from the camera" in text for text in texts) == 1
    assert not any(text.endswith("shown") for text in texts)
    # Both wrists: 0.3 * 0.62 m * (-1, -1/2, 0, 1/2, 1), whose unbiased sd is sqrt(2.5 / 4) * 186 mm = 147 mm.
    assert texts.count("depth sd at the wrists 147 mm") == 2


def test_one_hypothesis_has_no_spread(tmp_path):
    texts = svg_text(tmp_path, *make_people(1, 1), H36M_17)
    assert "1 hypothesis" in texts
    assert not any("depth sd" in text for text in texts)


def test_labels(tmp_path):
    assert not any(text.startswith("pose ") for text in svg_text(tmp_path, *make_people(1), H36M_17))
    assert {"pose 0", "pose 1"} <= set(svg_text(tmp_path, *make_people(2), H36M_17))


def test_dollar_signs_are_only_text(tmp_path):
    plot_poses(tmp_path / "poses.png", *make_people(1), H36M_17, labels=[r"$\nothing$ _^{"])


def test_long_labels_keep_their_end(tmp_path):
    label = "a/very/long/folder/name/000000123456.jpg,\nperson 2"
    assert "…000123456.jpg, person 2" in svg_text(tmp_path, *make_people(1), H36M_17, labels=[label])


@pytest.mark.parametrize(
    ("count", "bad", "max_people", "footer", "first"),
    [
        (6, [], 4, "4 of 6 shown", "pose 0"),
        (3, [0], 4, "2 of 3 shown, 1 without a pose", "pose 1"),
        (6, [0, 3], 2, "2 of 6 shown, 2 without a pose", "pose 1"),
    ],
)
def test_footer(tmp_path, count, bad, max_people, footer, first):
    keypoints, hypotheses, poses_3d = make_people(count, 2)
    poses_3d[bad] = np.nan
    texts = svg_text(tmp_path, keypoints, hypotheses, poses_3d, H36M_17, max_people=max_people)
    assert footer in texts
    names = [text for text in texts if text.startswith("pose ")]
    assert names[0] == first
    assert len(names) == min(max_people, count - len(bad))
    assert not {f"pose {index}" for index in bad} & set(names)


def test_nan_hypotheses_are_skipped_too(tmp_path):
    keypoints, hypotheses, poses_3d = make_people(2)
    hypotheses[0, 1, 3] = np.nan
    assert "1 of 2 shown, 1 without a pose" in svg_text(tmp_path, keypoints, hypotheses, poses_3d, H36M_17)


def test_a_skipped_person_changes_no_other(tmp_path):
    keypoints, hypotheses, poses_3d = make_people(2)
    poses_3d[0] = np.nan
    hypotheses[0] += 7.0
    plot_poses(tmp_path / "two.png", keypoints, hypotheses, poses_3d, H36M_17, labels=["a", "b"])
    plot_poses(tmp_path / "one.png", keypoints[1:], hypotheses[1:], poses_3d[1:], H36M_17, labels=["b"])
    two, one = picture(tmp_path / "two.png"), picture(tmp_path / "one.png")
    assert two.shape == one.shape
    np.testing.assert_array_equal(two[:-60], one[:-60])  # all but the footer


def test_missing_keypoints(tmp_path):
    def draw(keypoints):
        plot_poses(tmp_path / "poses.png", keypoints, hypotheses, poses_3d, H36M_17)
        return picture(tmp_path / "poses.png")

    keypoints, hypotheses, poses_3d = make_people()
    full = draw(keypoints)
    with_confidence = np.concatenate([keypoints, np.ones((1, 17, 1))], axis=-1)
    np.testing.assert_array_equal(full, draw(with_confidence))
    without_knee = []
    for axis, value in ((0, np.nan), (1, np.nan), (2, 0.0), (2, np.nan)):
        changed = with_confidence.copy()
        changed[0, 2, axis] = value
        without_knee.append(draw(changed))
        np.testing.assert_array_equal(without_knee[0], without_knee[-1])
    assert (full != without_knee[0]).any()
    assert with_confidence[0, 2, 2] == 1  # the caller's array is left alone


@pytest.mark.parametrize("present", [[], [0], [0, 7]])
def test_hardly_any_keypoints(tmp_path, present):
    keypoints, hypotheses, poses_3d = make_people()
    keypoints[:, np.setdiff1d(np.arange(17), present)] = np.nan
    texts = svg_text(tmp_path, keypoints, hypotheses, poses_3d, H36M_17)
    assert ("no keypoints" in texts) == (not present)


def test_coinciding_keypoints(tmp_path):
    keypoints, hypotheses, poses_3d = make_people()
    keypoints[:] = 100.0
    plot_poses(tmp_path / "poses.png", keypoints, hypotheses, poses_3d, H36M_17)
    plot_poses(tmp_path / "poses.png", keypoints, 0 * hypotheses, 0 * poses_3d, H36M_17)


def test_a_stray_hypothesis_does_not_shrink_the_person(tmp_path):
    keypoints, hypotheses, poses_3d = make_people()
    hypotheses[0, 0, 13] = [0.0, 0.0, 50.0]
    plot_poses(tmp_path / "poses.png", keypoints, hypotheses, poses_3d, H36M_17)
    blue = np.abs(picture(tmp_path / "poses.png")[135:, :550, :3] - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    assert np.ptp(np.nonzero(blue)[0]) > 200


def test_depth_spread():
    hypotheses = np.zeros((2, 17, 3))
    hypotheses[:, 13, 2] = [-0.03, 0.03]  # variance 2 * 30² mm²
    hypotheses[:, 16, 2] = [-0.04, 0.04]
    assert depth_spread(hypotheses, H36M_17) == (pytest.approx(np.sqrt(30.0**2 + 40.0**2)), "at the wrists")
    unnamed = Skeleton("chain", ("a", "b", "c"), (-1, 0, 1), (), ())
    assert depth_spread(hypotheses[:, [0, 13, 16]], unnamed) == (pytest.approx(50.0), "over all joints")


def test_errors(tmp_path):
    keypoints, hypotheses, poses_3d = make_people(2)
    path = tmp_path / "poses.png"
    for bad in (keypoints[:1], keypoints[:, :16], keypoints[..., :1], keypoints[0]):
        with pytest.raises(ValueError, match=r"keypoints must have shape \[2, 17, 2 or 3\], got"):
            plot_poses(path, bad, hypotheses, poses_3d, H36M_17)
    for bad in (hypotheses[:1], hypotheses[:, :, :16], hypotheses[..., :2], hypotheses[0], hypotheses[:, :0]):
        with pytest.raises(ValueError, match=r"hypotheses must have shape \[2, H, 17, 3\], H >= 1, got"):
            plot_poses(path, keypoints, bad, poses_3d, H36M_17)
    for bad in (poses_3d[:, :16], poses_3d[..., :2], poses_3d[0]):
        with pytest.raises(ValueError, match=r"poses_3d must have shape \[B, 17, 3\], got"):
            plot_poses(path, keypoints, hypotheses, bad, H36M_17)
    with pytest.raises(ValueError, match=r"poses_3d must have shape \[B, 15, 3\], got \(2, 17, 3\)"):
        plot_poses(path, keypoints, hypotheses, poses_3d, HUMANEVA_15)
    with pytest.raises(ValueError, match="labels must have one entry per pose, 2, got 1"):
        plot_poses(path, keypoints, hypotheses, poses_3d, H36M_17, labels=["a"])
    with pytest.raises(ValueError, match="max_people must be at least 1, got 0"):
        plot_poses(path, keypoints, hypotheses, poses_3d, H36M_17, max_people=0)
    with pytest.raises(ValueError, match="finite pose to draw, got none among 2"):
        plot_poses(path, keypoints, hypotheses, poses_3d * np.nan, H36M_17)
    with pytest.raises(ValueError, match="finite pose to draw, got none among 0"):
        plot_poses(path, keypoints[:0], hypotheses[:0], poses_3d[:0], H36M_17)
    with pytest.raises(ValueError, match="must be root-relative and in metres, got a joint 880 from the root"):
        plot_poses(path, keypoints, 1000 * hypotheses, 1000 * poses_3d, H36M_17)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["poses.jpg", "poses", "poses.npz"])
def test_unsupported_suffix(tmp_path, name):
    # The suffix is looked at first: the arrays are not even arrays.
    with pytest.raises(ValueError, match=rf"path must end in \.png, \.pdf, \.svg, got '.*{name}'"):
        plot_poses(tmp_path / name, None, None, None, H36M_17)  # type: ignore[arg-type]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot_poses(tmp_path / "nowhere" / "poses.png", None, None, None, H36M_17)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_the_old_picture_and_no_other_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, file, **kwargs):
        Path(file).write_bytes(b"half a picture")
        raise OSError("no space left")

    path = tmp_path / "poses.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        plot_poses(path, *make_people(), H36M_17)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("poses.png", b"old")]


def test_matplotlib_is_imported_late_and_without_pyplot(tmp_path):
    code = """
import sys
import diffupose.lifting.plot
assert "matplotlib" not in sys.modules
import numpy as np
from diffupose.skeleton import H36M_17
pose = np.random.default_rng(0).normal(size=(1, 17, 3))
diffupose.lifting.plot.plot_poses(sys.argv[1], pose[..., :2], pose[:, None], pose, H36M_17)
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "poses.png")], check=True, timeout=120)
