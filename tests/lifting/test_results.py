"""The Lifter: what its results depend on."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from support.lifts import CLOSE, SIZE, difference
from support.tiny_lifters import people, tiny_config, tiny_lifter, write_tiny_lifter

from diffupose import Lifter
from diffupose.engines import choose
from diffupose.engines.module_engines import ModuleEngine
from diffupose.errors import BackendUnavailableError
from diffupose.networks.build import LifterFile, load_lifter_file
from diffupose.ops import PackedDenoiser, available_backends
from diffupose.skeleton import H36M_17
from diffupose.testing import requires_cpp


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


def counted(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call


@pytest.mark.parametrize("rows", [2, 7])
def test_chunking_changes_nothing(lifter, rows, monkeypatch):
    poses = people(3)
    whole = lifter(poses, image_size=SIZE).hypotheses
    calls = []
    for engine in (PackedDenoiser, ModuleEngine):
        monkeypatch.setattr(engine, "max_hypotheses", rows)
        monkeypatch.setattr(engine, "sample", counted(engine.sample, calls))
    chunked = lifter(poses, image_size=SIZE).hypotheses
    assert len(calls) >= 3
    assert difference(whole, chunked) < CLOSE
    if available_backends()["cpp"][0]:
        assert torch.equal(whole, chunked)
    assert difference(lifter(poses, image_size=SIZE, backend="torch").hypotheses, whole) < CLOSE


@requires_cpp
@pytest.mark.parametrize("kind", ["person", "image"])
def test_changed_weights_are_packed_anew(tmp_path, kind, monkeypatch):
    packed = []
    monkeypatch.setattr(choose, "PackedDenoiser", counted(PackedDenoiser, packed))
    poses, lifter = people(2), tiny_lifter(tmp_path, kind)
    before = lifter(poses, image_size=SIZE).hypotheses
    assert torch.equal(lifter(poses, image_size=SIZE).hypotheses, before)
    assert len(packed) == 1
    with torch.no_grad():
        for parameter in lifter.denoiser.parameters():
            parameter.mul_(1.1)
    after = lifter(poses, image_size=SIZE)
    assert difference(after.hypotheses, before) > 1e-3
    assert difference(after.hypotheses, lifter(poses, image_size=SIZE, backend="torch").hypotheses) < CLOSE
    assert len(packed) == 2
    rough = lifter(poses, image_size=SIZE, precision="bfloat16")
    assert 0 < difference(rough.hypotheses, after.hypotheses) < 0.05
    assert len(packed) == 3 and rough.meta["precision"] == "bfloat16"
    assert torch.equal(lifter(poses, image_size=SIZE).hypotheses, after.hypotheses)  # still there
    assert len(packed) == 3


@requires_cpp
def test_statistics_and_buffers_count_as_weights(tmp_path):
    """BatchNorm seen more data, an adjacency scaled, weights replaced: what is packed follows."""
    torch.manual_seed(3)  # statistics of some others make a network in which rounding alone moves poses by 2e-5
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
    lifter._engines.clear()
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


def test_antithetic_pairs_are_refused_with_the_reason(person_lifter):
    """0.1.0 drew them; files that store the option as off still load, and calls may say that it is off."""
    lift = partial(person_lifter, people(2), image_size=SIZE, num_hypotheses=4)
    assert torch.equal(lift(antithetic=False).hypotheses, lift().hypotheses)
    for value in (True, 1, "no"):
        with pytest.raises(ValueError, match=r"antithetic must be False: .* not independent .* covariance"):
            lift(antithetic=value)
    stored = person_lifter.config.to_dict()
    assert stored["sampling"]["antithetic"] is False
    stored["sampling"]["antithetic"] = True
    with pytest.raises(ValueError, match="antithetic must be False"):
        type(person_lifter.config).from_dict(stored)


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
