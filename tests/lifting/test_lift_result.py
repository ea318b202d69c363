"""LiftResult: aggregates, covariance, and the files it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.tiny_lifters import people, tiny_lifter

import diffupose
from diffupose.keypoints import read_keypoints
from diffupose.ops import _backend, available_backends
from diffupose.skeleton import H36M_17

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (1000, 800)
KEYS = {
    "poses_3d": (3, 17, 3),
    "hypotheses": (3, 5, 17, 3),
    "covariance": (3, 17, 3, 3),
    "keypoints_2d": (3, 17, 2),
    "confidence": (3, 17),
    "frame": (3,),
    "person": (3,),
    "image_id": (3,),
    "joint_names": (17,),
    "edges": (16, 2),
    "units": (),
    "coordinate_frame": (),
    "meta": (),
}
K = [[900.0, 0.0, 500.0], [0.0, 900.0, 400.0], [0.0, 0.0, 1.0]]


@pytest.fixture(scope="module")
def lifter(tmp_path_factory):
    return tiny_lifter(tmp_path_factory.mktemp("lifter"))


@pytest.fixture(scope="module")
def result(lifter):
    """Three rows: complete, with a missing joint, unusable."""
    poses = people(3)
    poses[1, 16] = np.nan
    poses[2, 2:] = np.nan
    return lifter(poses, image_size=SIZE, on_unusable="nan", seed=3)


def test_mean_and_covariance_by_definition(result, lifter):
    values = result.hypotheses[:2].double().numpy()
    assert np.abs(result.mean[:2].numpy() - values.mean(axis=1)).max() < 1e-6
    for row in range(2):
        for joint in range(17):
            expected = np.cov(values[row, :, joint], rowvar=False) * float(lifter.covariance_scale[joint])
            assert np.abs(result.covariance[row, joint].numpy() - expected).max() < 1e-6
    assert float(lifter.covariance_scale[16]) == 2.0  # the factors are not all 1
    assert bool((torch.linalg.eigvalsh(result.covariance[:2, 1:].double()) > -1e-9).all())


@pytest.mark.parametrize(("count", "known"), [(1, False), (3, False), (4, True)])
def test_covariance_needs_four_hypotheses(lifter, count, known):
    covariance = lifter(people(1), image_size=SIZE, num_hypotheses=count).covariance
    assert covariance.shape == (1, 17, 3, 3)
    assert bool(torch.isfinite(covariance).all()) is known
    assert bool(torch.isnan(covariance).all()) is not known


def test_aggregates(lifter):
    mean = lifter(people(2), image_size=SIZE)
    medoid = lifter(people(2), image_size=SIZE, aggregation="medoid")
    assert torch.equal(mean.hypotheses, medoid.hypotheses)
    assert torch.equal(mean.poses_3d, mean.mean)
    assert torch.equal(mean.best(), mean.mean)
    assert torch.equal(medoid.poses_3d, mean.best("medoid"))
    distances = (mean.hypotheses - mean.medoid[:, None]).abs().amax(dim=(2, 3))
    assert torch.equal(distances.amin(dim=1), torch.zeros(2))  # it is one of them
    assert not torch.equal(mean.mean, mean.medoid)


def test_best_by_reprojection(lifter):
    result = lifter(people(2), image_size=SIZE)
    best = result.best("reprojection", intrinsics=K)
    assert torch.equal((result.hypotheses - best[:, None]).abs().amax(dim=(2, 3)).amin(dim=1), torch.zeros(2))
    with pytest.raises(ValueError, match="intrinsics must be given for method reprojection"):
        result.best("reprojection")
    with pytest.raises(ValueError, match="intrinsics must have shape"):
        result.best("reprojection", intrinsics=[900, 900, 500, 400])
    with pytest.raises(ValueError, match=r"method must be mean, medoid, density, .*, got 'median'"):
        result.best("median")


def test_one_camera_for_all_people(lifter):
    result = lifter(people(3), image_size=SIZE)
    for method in ("reprojection", "reprojection_mean"):
        shared = result.best(method, intrinsics=K)
        assert torch.equal(shared, result.best(method, intrinsics=np.broadcast_to(K, (3, 3, 3))))
    assert not torch.equal(shared, result.mean)
    assert lifter(np.zeros((0, 17, 2)), image_size=SIZE).best("reprojection_mean", intrinsics=K).shape == (0, 17, 3)


def test_npz_is_as_documented(result, tmp_path):
    result.save(tmp_path / "poses.npz")
    with np.load(tmp_path / "poses.npz", allow_pickle=False) as data:
        assert {name: data[name].shape for name in data.files} == KEYS
        for name in ("poses_3d", "hypotheses", "covariance", "keypoints_2d", "confidence"):
            assert data[name].dtype == np.float32
        assert np.array_equal(data["hypotheses"], result.hypotheses.numpy(), equal_nan=True)
        assert np.array_equal(data["poses_3d"], result.mean.numpy(), equal_nan=True)
        assert np.isnan(data["poses_3d"][2]).all() and np.isfinite(data["poses_3d"][:2]).all()
        assert np.isnan(data["keypoints_2d"][1, 16]).all() and data["confidence"][1, 16] == 0.0
        assert data["frame"].tolist() == [0, 1, 2] and data["person"].tolist() == [0, 0, 0]
        assert data["image_id"].tolist() == ["0", "1", "2"]
        assert tuple(data["joint_names"].tolist()) == H36M_17.joint_names
        assert [tuple(edge) for edge in data["edges"].tolist()] == list(H36M_17.edges)
        assert str(data["units"]) == "metres"
        assert "x right, y down, z forward" in str(data["coordinate_frame"])
        assert json.loads(str(data["meta"])) == result.meta


def test_meta_is_complete(lifter):
    meta = lifter(people(2), image_size=SIZE, seed=-3, num_hypotheses=np.int64(4), assumed_focal=1.5).meta
    engine = f"cpp {_backend.cpp().active_isa()}" if available_backends()["cpp"][0] else "torch"
    assert meta == {
        "model": "parallel",
        "input_normalization": "person",
        "sampler": "ddim",
        "num_inference_steps": 3,
        "eta": 0.0,
        "timestep_spacing": "trailing",
        "variance": "fixed_small",
        "num_hypotheses": 4,
        "flip": False,
        "antithetic": False,
        "aggregation": "mean",
        "seed": -3,
        "focal_length_px": [1500.0],
        "assumed_focal": 1.5,
        "engine": engine,
        "precision": "float32",
        "diffupose": diffupose.__version__,
        "torch": torch.__version__,
    }
    assert json.loads(json.dumps(meta)) == meta
    assert json.dumps(lifter(people(1), image_size=SIZE, seed=np.uint64(2**63)).meta)


def refuse(constant):
    raise AssertionError(f"{constant} is not strict JSON")


def test_json_has_the_same_keys_and_values(result, tmp_path):
    result.save(
        tmp_path / "poses.json", frame=np.array([4, 4, 9]), person=np.array([0, 1, 0]), image_id=["b", "b", "é"]
    )
    content = json.loads((tmp_path / "poses.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert set(content) == set(KEYS)
    arrays = result.arrays()
    for name in ("poses_3d", "hypotheses", "covariance", "keypoints_2d", "confidence"):
        # null is NaN, and every digit that a float32 has is there: small covariances are not rounded away.
        values = np.array(content[name], dtype=np.float32)
        assert np.array_equal(values, arrays[name], equal_nan=True), name
    assert content["keypoints_2d"][1][16] == [None, None]
    assert (content["frame"], content["person"], content["image_id"]) == ([4, 4, 9], [0, 1, 0], ["b", "b", "é"])
    assert content["edges"] == [list(edge) for edge in H36M_17.edges]
    assert content["units"] == "metres"
    assert content["meta"] == result.meta


def test_tiny_values_survive_json(lifter, tmp_path):
    result = lifter(people(1), image_size=SIZE)
    result.hypotheses[:] = 1e-4 * torch.randn_like(result.hypotheses)  # variances of 1e-8 square metres
    result.save(tmp_path / "poses.json")
    covariance = np.array(json.loads((tmp_path / "poses.json").read_text())["covariance"])
    assert np.allclose(covariance, result.covariance.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_translation_is_written_with_intrinsics(lifter, tmp_path, suffix):
    result = lifter(people(2), intrinsics=K)
    path = tmp_path / f"poses{suffix}"
    result.save(path)
    if suffix == ".npz":
        with np.load(path) as data:
            names, translation = set(data.files), data["translation"]
    else:
        content = json.loads(path.read_text())
        names, translation = set(content), np.array(content["translation"], dtype=np.float32)
    assert names == {*KEYS, "translation"}
    assert np.array_equal(translation, result.translation.numpy())


def test_what_lift_writes_can_be_lifted_again(result, lifter, tmp_path):
    result.save(tmp_path / "poses.npz")
    again = read_keypoints(tmp_path / "poses.npz", score_threshold=None)
    assert again.source_format == "lift"
    assert np.array_equal(again.keypoints[..., :2], result.keypoints_2d.numpy(), equal_nan=True)


def test_saving_twice_overwrites(result, tmp_path):
    path = tmp_path / "poses.npz"
    path.write_text("old")
    result.save(path)
    result.save(str(path))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["poses.npz"]
    assert np.load(path)["frame"].shape == (3,)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_the_old_file_or_none(result, tmp_path, monkeypatch, existing):
    path = tmp_path / "poses.npz"
    if existing:
        path.write_bytes(b"old")

    def fail(target, **arrays):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="No space left"):
        result.save(path)
    assert [item.read_bytes() for item in tmp_path.iterdir()] == ([b"old"] if existing else [])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("poses.txt", ValueError, r"path must end in \.npz or \.json, got .*poses\.txt"),
        ("poses", ValueError, "path must end in"),
        ("missing/poses.npz", FileNotFoundError, "the folder .*missing.* does not exist"),
    ],
)
def test_refused_paths(result, tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        result.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["frame", "person", "image_id"])
def test_rows_must_match(result, tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} must have shape \[3\], got \(2,\)"):
        result.save(tmp_path / "poses.npz", **{name: np.array([0, 1])})
    assert not list(tmp_path.iterdir())
