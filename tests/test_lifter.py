"""The Lifter: what the noise depends on, how the camera takes part, joint counts, missing joints, and errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.released_checkpoint import write_released_checkpoint
from support.tiny_lifters import people, tiny_config, tiny_lifter, write_tiny_lifter
from torch import nn

import diffupose.lifter
from diffupose import Lifter
from diffupose.camera import ASSUMED_FOCAL, person_box, project, rotation_to_ray, viewing_ray
from diffupose.checkpoint import LifterFile, load_lifter_file
from diffupose.conditioning import condition
from diffupose.errors import BackendUnavailableError
from diffupose.ops import PackedDenoiser, available_backends
from diffupose.skeleton import H36M_17
from diffupose.testing import requires_cpp

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (1000, 800)
CLOSE = 1e-5  # metres


@pytest.fixture(scope="module")
def person_lifter(tmp_path_factory):
    return tiny_lifter(tmp_path_factory.mktemp("person"))


@pytest.fixture(scope="module")
def image_lifter(tmp_path_factory):
    return tiny_lifter(tmp_path_factory.mktemp("image"), "image")


@pytest.fixture(params=["person", "image"])
def lifter(request, person_lifter, image_lifter):
    return person_lifter if request.param == "person" else image_lifter


def difference(first, second):
    return float((first - second).abs().max())


# --- what a result depends on ---------------------------------------------------------------------------------------


def test_shapes_and_root(lifter):
    result = lifter(people(2), image_size=SIZE, num_hypotheses=4, flip=False)
    assert result.hypotheses.shape == (2, 4, 17, 3)
    assert torch.equal(result.hypotheses[:, :, 0], torch.zeros(2, 4, 3))
    assert bool(torch.isfinite(result.hypotheses).all())
    assert result.translation is None
    # The hypotheses are no copies of each other.
    assert float(result.hypotheses[:, :, 1:].std(dim=1).mean()) > 1e-3


def test_a_row_does_not_depend_on_its_batch(lifter):
    poses, ids = people(5), np.array([3, 1, 4, 15, 9])
    together = lifter(poses, image_size=SIZE, frame_ids=ids).hypotheses
    for row in range(5):
        alone = lifter(poses[row], image_size=SIZE, frame_ids=ids[row : row + 1]).hypotheses
        assert difference(alone[0], together[row]) < CLOSE
    order = [4, 2, 0, 3, 1]
    shuffled = lifter(poses[order], image_size=SIZE, frame_ids=ids[order]).hypotheses
    assert difference(shuffled, together[order]) < CLOSE


@pytest.mark.parametrize("rows", [2, 7])
def test_chunking_changes_nothing(lifter, rows, monkeypatch):
    poses = people(3)
    whole = lifter(poses, image_size=SIZE).hypotheses
    calls = []
    original = diffupose.lifter.sample
    monkeypatch.setattr(
        diffupose.lifter, "sample", lambda *args, **more: calls.append(len(args[1])) or original(*args, **more)
    )
    bytes_per_row = 17 * 32 * 4 * 8
    monkeypatch.setattr(diffupose.lifter, "_CHUNK_BYTES", rows * bytes_per_row)
    monkeypatch.setattr(PackedDenoiser, "max_hypotheses", rows)
    chunked = lifter(poses, image_size=SIZE).hypotheses
    assert len(calls) >= 3
    assert difference(whole, chunked) < CLOSE
    if available_backends()["cpp"][0]:
        assert torch.equal(whole, chunked)
    assert difference(lifter(poses, image_size=SIZE, backend="torch").hypotheses, whole) < CLOSE


@requires_cpp
@pytest.mark.parametrize("kind", ["person", "image"])
def test_changed_weights_are_packed_anew(tmp_path, kind):
    poses, lifter = people(2), tiny_lifter(tmp_path, kind)
    before = lifter(poses, image_size=SIZE).hypotheses
    [packed] = lifter._packer._packed.values()
    assert torch.equal(lifter(poses, image_size=SIZE).hypotheses, before)
    assert list(lifter._packer._packed.values()) == [packed]
    with torch.no_grad():
        for parameter in lifter.denoiser.parameters():
            parameter.mul_(1.1)
    after = lifter(poses, image_size=SIZE)
    assert difference(after.hypotheses, before) > 1e-3
    assert difference(after.hypotheses, lifter(poses, image_size=SIZE, backend="torch").hypotheses) < CLOSE
    assert len(lifter._packer._packed) == 1
    rough = lifter(poses, image_size=SIZE, precision="bfloat16")
    assert 0 < difference(rough.hypotheses, after.hypotheses) < 0.05
    assert len(lifter._packer._packed) == 2 and rough.meta["precision"] == "bfloat16"


@requires_cpp
def test_statistics_and_buffers_count_as_weights(tmp_path):
    """BatchNorm seen more data, an adjacency scaled, weights replaced: what is packed follows."""
    poses, lifter = people(2), tiny_lifter(tmp_path, "image")

    def agrees():
        fused, plain = (lifter(poses, image_size=SIZE, backend=name).hypotheses for name in ("cpp", "torch"))
        return difference(fused, plain) < CLOSE

    before = lifter(poses, image_size=SIZE).hypotheses
    lifter.denoiser.train()
    lifter.denoiser(torch.randn(8, 17, 3), torch.randn(8, 17, 2), torch.tensor([3]))
    lifter.denoiser.eval()
    assert difference(lifter(poses, image_size=SIZE).hypotheses, before) > 1e-4 and agrees()
    with torch.no_grad():
        for buffer in lifter.denoiser.buffers():
            if buffer.is_floating_point():
                buffer.mul_(0.9)
    assert agrees()
    for parameter in lifter.denoiser.parameters():
        parameter.data = 1.05 * parameter.data
    assert agrees()
    parameter.data.mul_(2.0)  # behind torch's back
    lifter._packer.clear()
    assert agrees()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lifter: pickle.loads(pickle.dumps(lifter))])
def test_a_used_lifter_can_be_copied_and_pickled(tmp_path, copied):
    lifter = tiny_lifter(tmp_path)
    first = lifter(people(1), image_size=SIZE).hypotheses
    assert difference(copied(lifter)(people(1), image_size=SIZE).hypotheses, first) < CLOSE


@requires_cpp
def test_networks_that_cannot_be_packed(lifter):
    """A hook wants to see the module run; a network in training mode, or of somebody else, is not in the engine."""
    seen = []
    handle = lifter.denoiser.register_forward_hook(lambda *_: seen.append(1))
    result = lifter(people(1), image_size=SIZE)
    assert seen and result.meta["engine"] == "torch"
    with pytest.raises(BackendUnavailableError, match='backend "cpp" is not available'):
        lifter(people(1), image_size=SIZE, backend="cpp")
    with pytest.raises(ValueError, match=r"precision must be float32 where PyTorch runs the network, got 'bfloat16'"):
        lifter(people(1), image_size=SIZE, precision="bfloat16")
    handle.remove()
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'int8'"):
        lifter(people(1), image_size=SIZE, precision="int8")


def test_seed(lifter):
    def lift(seed):
        return lifter(people(2), image_size=SIZE, seed=seed).hypotheses

    assert torch.equal(lift(5), lift(5))
    assert difference(lift(5), lift(6)) > 1e-3
    assert difference(lift(5), lift(5 + 2**32)) > 1e-3  # all 64 bits count
    assert torch.equal(lift(-1), lift(2**64 - 1))
    assert torch.equal(lift(np.int64(5)), lift(5))


def test_frame_ids(lifter):
    poses = np.repeat(people(1), 3, axis=0)

    def lift(ids):
        return lifter(poses, image_size=SIZE, frame_ids=ids).hypotheses

    default = lifter(poses, image_size=SIZE).hypotheses
    assert torch.equal(default, lift([0, 1, 2]))
    assert difference(default[0], default[1]) > 1e-3  # equal people with different ids get different noise
    repeated = lift([7, 7, 8])
    assert difference(repeated[0], repeated[1]) < CLOSE < difference(repeated[1], repeated[2])
    # Ids are 64 bits: above 2^63 they arrive as unsigned, or as the negative number of the same bits.
    large = lift(np.array([2**63 + 5, 2**64 - 1, 0], dtype=np.uint64))
    assert torch.equal(large, lift(np.array([5 - 2**63, -1, 0])))
    assert torch.equal(large, lift(torch.tensor([5 - 2**63, -1, 0])))
    assert difference(large[0], lift([5, 0, 0])[0]) > 1e-3
    # Small ids beside one above 2^63, for which NumPy has floats only.
    mixed = lift([2**64 - 1, *range(1, len(poses))])
    assert torch.equal(mixed, lift([-1, *range(1, len(poses))]))


def test_a_deterministic_model_regresses_in_one_call(tmp_path):
    """The network sees no noise and the last timestep; every hypothesis is the same, whatever the seed."""
    config = tiny_config()
    diffusion = replace(config.diffusion, deterministic=True)
    file = load_lifter_file(write_tiny_lifter(tmp_path / "tiny.safetensors"))
    lifter = Lifter(replace(file, config=replace(config, diffusion=diffusion)))
    calls = []
    lifter.denoiser.register_forward_hook(lambda _, inputs, output: calls.append((*inputs, output)))
    result = lifter(people(3), image_size=SIZE, num_hypotheses=4, assumed_focal=None)
    [(sample, _, timesteps, output)] = calls
    assert not sample.any() and timesteps.tolist() == [49]
    poses = lifter.pose_mean + lifter.pose_scale * output
    torch.testing.assert_close(result.hypotheses, (poses - poses[:, :1])[:, None].expand(3, 4, 17, 3))
    assert difference(result.hypotheses, lifter(people(3), image_size=SIZE, num_hypotheses=4, assumed_focal=None,
                                                seed=1).hypotheses) == 0  # fmt: skip


def test_antithetic_pairs(person_lifter):
    """The first of a pair is as without; the second has the opposite noise, so the mean of a linear model is exact."""
    with pytest.warns(UserWarning, match="not independent: the covariance has no valid regions"):
        pairs = person_lifter(people(2), image_size=SIZE, num_hypotheses=6, antithetic=True).hypotheses
    plain = person_lifter(people(2), image_size=SIZE, num_hypotheses=3).hypotheses
    assert difference(pairs[:, ::2], plain) < CLOSE
    assert difference(pairs[:, 1::2], plain) > 0.01

    class Linear(nn.Module):
        def forward(self, sample, condition, timesteps):
            return 0.3 * sample + condition

    linear = Lifter(LifterFile(person_lifter.config, Linear(), torch.zeros(17, 3), torch.ones(17, 3), torch.ones(17)))
    with warnings.catch_warnings(action="ignore"):
        few = linear(people(2), image_size=SIZE, num_hypotheses=2, antithetic=True, eta=0.5)
        many = linear(people(2), image_size=SIZE, num_hypotheses=40, antithetic=True, eta=0.5)
    assert difference(few.mean, many.mean) < CLOSE
    assert difference(few.hypotheses[:, 0], few.mean) > 0.01


def test_analytic_variance(person_lifter):
    """It needs the model's prediction error, and widens the spread."""
    with pytest.raises(ValueError, match="variance must be fixed_small for a model without a prediction error"):
        person_lifter(people(2), image_size=SIZE, variance="analytic")
    with pytest.raises(ValueError, match=r"variance must be fixed_small with sampler dpm\+\+"):
        person_lifter(people(2), image_size=SIZE, variance="analytic", sampler="dpm++")
    measured = Lifter(LifterFile(
        person_lifter.config, person_lifter.denoiser, person_lifter.pose_mean, person_lifter.pose_scale,
        person_lifter.covariance_scale, torch.full((50,), 4.0),
    ))  # fmt: skip
    plain = measured(people(2), image_size=SIZE, num_hypotheses=30)
    wide = measured(people(2), image_size=SIZE, num_hypotheses=30, variance="analytic")
    assert wide.meta["variance"] == "analytic"
    assert float(wide.hypotheses.std(dim=1).mean()) > 1.1 * float(plain.hypotheses.std(dim=1).mean())


def test_fewer_hypotheses_are_the_first_of_more(lifter):
    ten = lifter(people(2), image_size=SIZE, num_hypotheses=10, flip=False).hypotheses
    three = lifter(people(2), image_size=SIZE, num_hypotheses=3, flip=False).hypotheses
    assert difference(three, ten[:, :3]) < CLOSE
    assert difference(three, ten[:, 3:6]) > 1e-3


def test_flipped_twins_follow_the_plain_hypotheses(lifter):
    plain = lifter(people(2), image_size=SIZE, num_hypotheses=8, flip=False).hypotheses
    flipped = lifter(people(2), image_size=SIZE, num_hypotheses=4, flip=True)
    assert flipped.hypotheses.shape == (2, 8, 17, 3)
    assert difference(flipped.hypotheses[:, :4], plain[:, :4]) < CLOSE
    # Twin i is the mirror image of what the mirrored person gets as hypothesis 4 + i.
    mirror = list(H36M_17.flip_permutation)
    mirrored = people(2)[:, mirror] * [-1, 1] + [SIZE[0], 0]
    seen = lifter(mirrored, image_size=SIZE, num_hypotheses=8, flip=False).hypotheses[:, 4:, mirror]
    assert difference(flipped.hypotheses[:, 4:], seen * torch.tensor([-1.0, 1.0, 1.0])) < CLOSE


# --- forms of the input ---------------------------------------------------------------------------------------------


def test_forms_of_keypoints(person_lifter):
    poses = np.rint(people(2))
    expected = person_lifter(poses, image_size=SIZE).hypotheses
    with_confidence = np.concatenate((poses, np.full((2, 17, 1), 0.7)), axis=-1)
    for form in (
        poses.tolist(),
        poses.astype(np.float32),
        poses.astype(np.int32),
        torch.from_numpy(poses),
        torch.from_numpy(poses).float().requires_grad_(),
        with_confidence,
        with_confidence.tolist(),
        np.asfortranarray(poses),
    ):
        assert difference(person_lifter(form, image_size=SIZE).hypotheses, expected) < CLOSE
    half = torch.from_numpy(poses).bfloat16()
    assert difference(person_lifter(half, image_size=SIZE).hypotheses, expected) < 0.1


@pytest.mark.parametrize("channels", [2, 3])
def test_leading_dimensions_are_flattened(person_lifter, channels):
    poses = np.concatenate((people(6), np.ones((6, 17, 1))), axis=-1)[..., :channels]
    flat = person_lifter(poses, image_size=SIZE)
    nested = person_lifter(poses.reshape(2, 3, 17, channels), image_size=SIZE)
    assert torch.equal(nested.hypotheses, flat.hypotheses)
    single = person_lifter(poses[0], image_size=SIZE)
    assert single.hypotheses.shape == (1, 5, 17, 3)
    assert difference(single.hypotheses, flat.hypotheses[:1]) < CLOSE


def test_an_empty_batch_gives_an_empty_result(lifter, tmp_path):
    result = lifter(np.zeros((0, 17, 2)), image_size=SIZE, intrinsics=[[900, 0, 500], [0, 900, 400], [0, 0, 1]])
    assert result.hypotheses.shape == (0, 10 if lifter.config.sampling.flip else 5, 17, 3)
    assert result.poses_3d.shape == result.medoid.shape == (0, 17, 3)
    assert result.covariance.shape == (0, 17, 3, 3)
    assert result.translation.shape[0] == 0
    result.save(tmp_path / "empty.npz")
    result.save(tmp_path / "empty.json")


def test_one_image_size_or_one_per_row(image_lifter):
    poses, sizes = people(2), [(1000, 800), (1400, 900)]
    both = image_lifter(poses, image_size=sizes).hypotheses
    for row, size in enumerate(sizes):
        one = image_lifter(poses, image_size=size).hypotheses
        assert difference(one[row], both[row]) < CLOSE
        assert difference(one[1 - row], both[1 - row]) > 1e-4
    assert torch.equal(image_lifter(poses, image_size=torch.tensor(sizes)).hypotheses, both)


def test_results_can_be_changed_and_take_part_in_autograd(person_lifter):
    result = person_lifter(people(1), image_size=SIZE)
    scale = torch.ones((), requires_grad=True)
    (result.hypotheses * scale).sum().backward()
    assert scale.grad is not None
    result.hypotheses.mul_(1000.0)


# --- the camera -----------------------------------------------------------------------------------------------------


def test_person_normalisation_ignores_place_and_size(person_lifter, image_lifter):
    near = people(3)
    far = 0.4 * near + [3000.0, -700.0]
    unturned = person_lifter(near, assumed_focal=None).hypotheses
    assert difference(person_lifter(far, assumed_focal=None).hypotheses, unturned) < CLOSE
    # With a focal length the place counts, and for screen coordinates it always does.
    size = (4000, 3000)
    turned = person_lifter(near, image_size=size).hypotheses
    assert difference(turned, unturned) > 1e-3
    assert difference(person_lifter(far + np.array([0, 900]), image_size=size).hypotheses, turned) > 1e-3
    shifted = image_lifter(near + np.array([200, 0]), image_size=size).hypotheses
    assert difference(image_lifter(near, image_size=size).hypotheses, shifted) > 1e-4


def matrix(fx, fy, cx, cy):
    return torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def test_turned_back_from_the_virtual_camera(person_lifter):
    """A prediction along the virtual camera's axis points along the viewing ray of the person afterwards."""
    keypoints = torch.from_numpy(people(2, center=(1700.0, 200.0))).float()
    focal, center = torch.tensor([900.0, 950.0]), torch.tensor([960.0, 540.0])
    unturned = person_lifter(keypoints, assumed_focal=None).hypotheses
    turned = person_lifter(keypoints, intrinsics=matrix(900, 950, 960, 540)).hypotheses
    box_center, _ = person_box(keypoints, torch.ones(2, 17, dtype=torch.bool))
    ray = torch.cat(((box_center - center) / focal, torch.ones(2, 1)), dim=-1)
    ray = ray / ray.norm(dim=-1, keepdim=True)  # [B, 3]
    # Depth in the virtual camera is the distance along the ray in the real one; lengths stay.
    along = torch.einsum("bhjc,bc->bhj", turned, ray)
    assert difference(along, unturned[..., 2]) < CLOSE
    assert difference(turned.norm(dim=-1), unturned.norm(dim=-1)) < CLOSE
    assert difference(turned, unturned) > 0.01
    # The smallest rotation leaves what is perpendicular to the axis and the ray.
    axis = torch.linalg.cross(ray, torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3))
    kept = [torch.einsum("bhjc,bc->bhj", poses, axis) for poses in (turned, unturned)]
    assert difference(*kept) < CLOSE


def test_assumed_focal_is_a_pinhole_at_the_middle_of_the_image(person_lifter):
    poses = people(2, center=(150.0, 600.0))
    assumed = person_lifter(poses, image_size=SIZE)
    given = person_lifter(poses, intrinsics=matrix(1150, 1150, 500, 400))
    assert ASSUMED_FOCAL == 1.15
    assert difference(assumed.hypotheses, given.hypotheses) < CLOSE
    other = person_lifter(poses, image_size=SIZE, assumed_focal=0.6).hypotheses
    assert difference(assumed.hypotheses, other) > 1e-3
    assert (assumed.meta["assumed_focal"], assumed.meta["focal_length_px"]) == (1.15, [1150.0])
    assert (given.meta["assumed_focal"], given.meta["focal_length_px"]) == (None, [1150.0])


class Oracle(nn.Module):
    """Predicts the same x0 for every row: a lifter that knows the pose."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def forward(self, sample, condition, timesteps):
        return self.x0.expand_as(sample)


def test_exact_pose_reprojects_exactly(person_lifter, monkeypatch):
    """The true pose, predicted in the virtual camera's frame, comes back, and with it the root."""
    pose = torch.cat((torch.randn(17, 2) * 0.3, torch.randn(17, 1) * 0.2), dim=-1)
    pose = pose - pose[:1]
    root = torch.tensor([1.6, -0.8, 4.0])
    focal, center = torch.tensor([1100.0, 1120.0]), torch.tensor([900.0, 500.0])
    keypoints = project(pose + root, focal, center).unsqueeze(0)
    box_center, _ = person_box(keypoints, torch.ones(1, 17, dtype=torch.bool))
    turn = rotation_to_ray(viewing_ray(box_center, focal, center))[0]
    seen = pose @ turn.T
    oracle = Oracle((seen - person_lifter.pose_mean) / person_lifter.pose_scale)
    monkeypatch.setattr(person_lifter, "denoiser", oracle)
    intrinsics = matrix(1100, 1120, 900, 500)
    result = person_lifter(keypoints, intrinsics=intrinsics, num_hypotheses=4)
    assert difference(result.hypotheses, pose.expand(1, 4, 17, 3)) < 1e-5
    assert difference(result.translation, root.expand(1, 4, 3)) < 1e-3
    placed = result.hypotheses + result.translation[:, :, None]
    reprojected = project(placed, focal.expand(1, 1, 2), center.expand(1, 1, 2))
    assert difference(reprojected, keypoints[:, None].expand_as(reprojected)) < 0.05
    assert difference(result.best("reprojection", intrinsics=intrinsics), pose[None]) < 1e-5
    without = person_lifter(keypoints, image_size=(1920, 1080))
    assert without.translation is None


def test_intrinsics_per_row(person_lifter):
    poses = people(2, center=(200.0, 300.0))
    matrices = torch.stack((matrix(900, 900, 500, 400), matrix(1500, 1400, 520, 390)))
    both = person_lifter(poses, intrinsics=matrices)
    for row in range(2):
        one = person_lifter(poses, intrinsics=matrices[row])
        assert difference(one.hypotheses[row], both.hypotheses[row]) < CLOSE
        # The depth of the root is a few metres with a relative precision of float32 keypoints.
        assert torch.allclose(one.translation[row], both.translation[row], rtol=1e-3)


# --- missing joints and joint counts --------------------------------------------------------------------------------


def missing(poses, joints):
    poses = poses.copy()
    poses[:, joints] = np.nan
    return poses


def test_a_presence_channel_sees_the_mask(person_lifter):
    poses = people(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = person_lifter(missing(poses, [13, 16]), image_size=SIZE)
    assert bool(torch.isfinite(result.hypotheses).all())
    assert torch.isnan(result.keypoints_2d[0, [13, 16]]).all()
    assert result.confidence[0].tolist() == [0.0 if joint in (13, 16) else 1.0 for joint in range(17)]
    assert difference(result.hypotheses, person_lifter(poses, image_size=SIZE).hypotheses) > 1e-4
    # NaN, a confidence of 0 and a NaN confidence are the same, whatever the coordinates say.
    for confidence in (0.0, np.nan):
        marked = np.concatenate((poses, np.ones((1, 17, 1))), axis=-1)
        marked[:, [13, 16]] = (12345.0, -777.0, confidence)
        assert torch.equal(person_lifter(marked, image_size=SIZE).hypotheses, result.hypotheses)
    seen = condition(
        result.keypoints_2d, result.confidence > 0, person_lifter.config, image_size=torch.tensor([[1000.0, 800.0]])
    )
    assert seen.inputs[0, :, 2].tolist() == result.confidence[0].tolist()
    assert torch.equal(seen.inputs[0, [13, 16]], torch.zeros(2, 3))


def test_without_one_they_are_filled_with_one_warning(image_lifter):
    gaps = missing(people(3), [13, 16])
    with pytest.warns(UserWarning, match="6 missing joints are filled by the mean pose") as caught:
        result = image_lifter(gaps, image_size=SIZE)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert bool(torch.isfinite(result.hypotheses).all())
    assert torch.isnan(result.keypoints_2d[:, [13, 16]]).all()  # what was given, not what was filled in
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_lifter(people(1), image_size=SIZE)


@pytest.mark.parametrize("kind", ["person", "image"])
def test_the_filled_pose_is_a_similarity_of_the_mean_pose(kind, tmp_path):
    from diffupose.mean_pose import fill_missing_joints, mean_pose_2d

    angle = 0.4
    turn = torch.tensor([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], dtype=torch.float32)
    joints = 17 if kind == "person" else 16
    pose = (120.0 * mean_pose_2d(joints) @ turn + torch.tensor([400.0, 300.0])).unsqueeze(0)
    present = torch.ones(1, joints, dtype=torch.bool)
    present[0, [2, 5, 9, 12]] = False
    filled = fill_missing_joints(torch.where(present[..., None], pose, torch.nan), present)
    assert difference(filled, pose) < 1e-3


def test_more_than_half_missing_is_unusable(lifter):
    poses = people(3)
    poses[1, :9] = np.nan  # 8 of 17 are left
    with pytest.raises(ValueError, match="row 1 has more than half of the joints missing"):
        lifter(poses, image_size=SIZE)
    intrinsics = matrix(900, 900, 500, 400)
    result = lifter(poses, image_size=SIZE, intrinsics=intrinsics, on_unusable="nan")
    assert result.usable.tolist() == [True, False, True]
    for value in (result.hypotheses, result.mean, result.medoid, result.covariance, result.translation):
        assert torch.isnan(value[1]).all()
        assert not torch.isnan(value[[0, 2]]).any()
    complete = lifter(people(3), image_size=SIZE, intrinsics=intrinsics).hypotheses
    assert difference(result.hypotheses[[0, 2]], complete[[0, 2]]) < CLOSE


@pytest.mark.filterwarnings("ignore:.*filled by the mean pose")
def test_exactly_half_is_enough(lifter):
    poses = people(1)
    poses[0, :8] = np.nan  # 9 of 17 are left
    assert bool(torch.isfinite(lifter(poses, image_size=SIZE).hypotheses).all())


def test_a_person_at_one_point_is_unusable(lifter):
    poses = np.full((1, 17, 2), 300.0)
    with pytest.raises(ValueError, match="all joints at one point"):
        lifter(poses, image_size=SIZE)
    result = lifter(poses, image_size=SIZE, on_unusable="nan")
    assert torch.isnan(result.hypotheses).all() and not result.usable.any()


def test_sixteen_joints_fill_seventeen(person_lifter):
    poses = people(2)
    without = np.delete(poses, 9, axis=1)
    expected = person_lifter(missing(poses, [9]), image_size=SIZE)
    result = person_lifter(without, image_size=SIZE)
    assert torch.equal(result.hypotheses, expected.hypotheses)
    assert torch.isnan(result.keypoints_2d[:, 9]).all()


def test_seventeen_joints_into_sixteen(tmp_path):
    lifter = tiny_lifter(tmp_path, "image", "h36m_16")
    poses = people(2)
    result = lifter(poses, image_size=SIZE)
    assert result.hypotheses.shape == (2, 10, 16, 3)
    assert torch.equal(result.hypotheses, lifter(np.delete(poses, 9, axis=1), image_size=SIZE).hypotheses)


@pytest.mark.parametrize("skeleton", ["h36m_17", "h36m_16"])
@pytest.mark.parametrize("joints", [15, 18, 1])
def test_other_joint_counts_are_refused(tmp_path, skeleton, joints):
    lifter = tiny_lifter(tmp_path, "person", skeleton)
    with pytest.raises(ValueError, match=f"keypoints must have {skeleton[-2:]} joints for this model, got {joints}"):
        lifter(100 * np.random.default_rng(0).normal(size=(1, joints, 2)), image_size=SIZE)


# --- the released checkpoint ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[16, 17], ids=["J16", "J17"])
def released(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "best_model.pt"
    write_released_checkpoint(path, 32, request.param, seed=1)
    return Lifter.from_pretrained(path, device="cpu")


def test_released_defaults(released):
    result = released(people(1), image_size=SIZE)
    joints = released.skeleton.num_joints
    assert result.hypotheses.shape == (1, 20, joints, 3)  # N = 10 and their flipped twins
    meta = {key: result.meta[key] for key in ("sampler", "num_inference_steps", "num_hypotheses", "flip")}
    assert meta == {"sampler": "ddpm", "num_inference_steps": 100, "num_hypotheses": 10, "flip": True}
    assert result.meta["input_normalization"] == "image"
    assert result.meta["focal_length_px"] is result.meta["assumed_focal"] is None
    # Clipped to 1 m per axis, then root-relative; the last step of the reverse process is x0 itself.
    assert float(result.hypotheses.abs().max()) <= 2.0
    with pytest.raises(ValueError, match="image_size must be given"):
        released(people(1))


def test_released_fits_few_steps_and_other_samplers(released):
    for sampler in ("ddim", "dpm++"):
        result = released(people(1), image_size=SIZE, sampler=sampler, num_inference_steps=5, num_hypotheses=2)
        assert bool(torch.isfinite(result.hypotheses).all())
        assert result.meta["sampler"] == sampler


# --- saving, loading, progress --------------------------------------------------------------------------------------


def test_save_pretrained_gives_the_same_lifter(lifter, tmp_path):
    lifter.save_pretrained(tmp_path / "again.safetensors")
    again = Lifter.from_pretrained(tmp_path / "again.safetensors", device="cpu")
    assert again.config == lifter.config
    first, second = (item(people(2), image_size=SIZE) for item in (lifter, again))
    assert torch.equal(first.hypotheses, second.hypotheses)
    assert torch.equal(first.covariance, second.covariance)


def test_a_bundled_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mocap").mkdir()
    assert Lifter.from_pretrained(device="cpu").skeleton == H36M_17
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Lifter.from_pretrained("./mocap", device="cpu")


def test_unknown_model_and_device(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model must be a file or a bundled name \(mocap\), got 'nonsense'"):
        Lifter.from_pretrained("nonsense")
    path = write_tiny_lifter(tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="device must be auto or one that PyTorch can use here, got 'abacus'"):
        Lifter.from_pretrained(path, device="abacus")
    assert Lifter.from_pretrained(str(path), device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize(("progress", "bar"), [(True, True), (False, False), (None, False)])
def test_progress_bar_on_long_work(person_lifter, progress, bar, capsys, monkeypatch):
    monkeypatch.setattr(diffupose.lifter, "tqdm", lambda **options: original(**(options | {"delay": 0.0})))
    original = __import__("tqdm").tqdm
    person_lifter(people(1), image_size=SIZE, progress=progress)
    captured = capsys.readouterr()
    assert ("pose" in captured.err) is bar  # captured output is no terminal
    assert captured.out == ""


def test_short_work_shows_no_bar(person_lifter, capsys):
    person_lifter(people(1), image_size=SIZE, progress=True)
    assert capsys.readouterr().err == ""


def test_defaults_come_from_the_checkpoint(person_lifter):
    assert person_lifter(people(1), image_size=SIZE).meta["num_inference_steps"] == 3
    settings = person_lifter.sampling(sampler=None, num_hypotheses=np.int64(7), eta=0.5)
    assert settings == replace(person_lifter.config.sampling, num_hypotheses=7, eta=0.5)
    assert isinstance(settings.num_hypotheses, int)
    # A checkpoint's eta belongs to ddim alone.
    eta = Lifter.sampling.__get__(person_lifter)(eta=1.0)
    assert eta.eta == 1.0
    assert person_lifter.sampling(sampler="ddpm").eta == 0.0


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=requires_cpp)])
def test_poses_are_the_same_whatever_the_default_dtype(tmp_path, backend):
    expected = tiny_lifter(tmp_path)(people(2), image_size=SIZE, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        lifter = Lifter.from_pretrained(tmp_path / "person.safetensors", device="cpu")
        result = lifter(people(2), image_size=SIZE, backend=backend)
        assert result.covariance.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(result.hypotheses, expected.hypotheses) < 1e-5


@pytest.mark.filterwarnings("ignore:the covariance was calibrated for")
def test_settings_change_the_result(person_lifter):
    base = person_lifter(people(1), image_size=SIZE).hypotheses
    for change in ({"num_inference_steps": 5}, {"eta": 1.0}, {"sampler": "ddpm"}, {"timestep_spacing": "leading"}):
        assert difference(person_lifter(people(1), image_size=SIZE, **change).hypotheses, base) > 1e-5, change


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hypotheses": 0}, "num_hypotheses must be a whole number of at least 1, got 0"),
        ({"num_hypotheses": -1}, "num_hypotheses must be"),
        ({"num_hypotheses": 1.5}, "num_hypotheses must be"),
        ({"num_hypotheses": True}, "num_hypotheses must be"),
        ({"num_hypotheses": 10**12}, "num_hypotheses must be at most"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"num_inference_steps": 100000}, "num_inference_steps must be an integer between 1 and 50"),
        ({"eta": 2.0}, "eta must be a number between 0 and 1"),
        ({"eta": float("nan")}, "eta must be"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta must lie in"),
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim"),
        ({"timestep_spacing": "log"}, "timestep_spacing must be one of"),
        ({"aggregation": "median"}, "aggregation must be one of mean, medoid"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits"),
        ({"seed": -(2**63) - 1}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"frame_ids": [0]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [0.0, 1.0]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [[0, 1]]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [2**64, 0]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [True, False]}, "frame_ids must be 2 integers"),
        ({"assumed_focal": "x"}, "assumed_focal must be in longer image sides, 0.05 to 100, or None, got x"),
        ({"assumed_focal": [1.15]}, "assumed_focal must be"),
        ({"assumed_focal": 0.0}, "assumed_focal must be"),
        ({"assumed_focal": float("nan")}, "assumed_focal must be"),
        ({"assumed_focal": float("inf")}, "assumed_focal must be"),
        ({"image_size": None}, "image_size must be given"),
        ({"on_unusable": "skip"}, "on_unusable must be error or nan"),
        ({"backend": "fortran"}, "backend must be one of"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument(person_lifter, change, message):
    with pytest.raises(ValueError, match=message):
        person_lifter(people(2), **({"image_size": SIZE} | change))


def test_steps_that_the_covariance_was_not_calibrated_for_are_told(person_lifter, tmp_path):
    seen = {"keypoints": people(1), "image_size": SIZE}
    with warnings.catch_warnings(action="error"):
        person_lifter(**seen)
        person_lifter(**seen, num_inference_steps=2, num_hypotheses=3)  # which have no covariance
        fresh = tiny_lifter(tmp_path)
        fresh.covariance_scale = torch.ones(17)  # of a model that nobody calibrated
        fresh(**seen, num_inference_steps=2)
    with pytest.warns(UserWarning, match="the covariance was calibrated for num_inference_steps 3: its regions may"):
        person_lifter(**seen, num_inference_steps=2)
    with pytest.warns(UserWarning, match="calibrated for num_inference_steps 3, eta 0.0: "):
        person_lifter(**seen, num_inference_steps=2, eta=0.5)
    with pytest.warns(UserWarning, match="calibrated for flip False: "):
        person_lifter(**seen, num_hypotheses=2, flip=True)  # four of them
