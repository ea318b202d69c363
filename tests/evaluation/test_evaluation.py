"""Scores, the table, and ``diffupose evaluate mocap``."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch

import diffupose.lifting.lifter
from diffupose.checkpoint import save_lifter_file
from diffupose.cli import main
from diffupose.config import PARALLEL, SamplingConfig
from diffupose.datasets.mocap import SAMPLE_SUBJECTS, Mocap, load_mocap
from diffupose.errors import InputError
from diffupose.evaluation.cells import RIGS, PoseBank, choose_poses, make_cell
from diffupose.evaluation.mocap import evaluate_mocap, format_table, score_hypotheses, score_poses
from diffupose.lifting.lifter import Lifter
from diffupose.metrics import energy_score, mpjpe, p_mpjpe
from diffupose.networks.build import LifterFile, build_denoiser
from diffupose.skeleton import H36M_16, H36M_17

CELLS = ["h36m clean", "h36m noisy", "wild clean", "wild noisy"]


@pytest.fixture(scope="module")
def sample():
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as path:
        return load_mocap(path)


@pytest.fixture(scope="module")
def people(sample):
    """Twelve poses, from two collections of 8 and 4."""
    chosen = sample.select(np.flatnonzero(sample.subject == SAMPLE_SUBJECTS[0])[::25][:12])
    return Mocap(chosen.positions, chosen.subject, np.repeat(["left", "right"], (8, 4)))


@pytest.fixture(scope="module")
def training(sample):
    return sample.select(np.flatnonzero(sample.subject != SAMPLE_SUBJECTS[0])[::10])


def tiny_file(skeleton="h36m_17"):
    torch.manual_seed(0)
    denoiser_config = replace(PARALLEL.denoiser, hidden_dim=32, num_layers=1, skeleton=skeleton)
    config = replace(
        PARALLEL, denoiser=denoiser_config, sampling=SamplingConfig("ddim", 2, num_hypotheses=3, flip=True), name="tiny"
    )
    joints = 16 if skeleton == "h36m_16" else 17
    denoiser = build_denoiser(denoiser_config).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():  # an untrained last layer is zero: nothing would differ
            parameter.add_(0.2 * torch.randn_like(parameter))
    scale = torch.full((joints, 3), 0.2)
    return LifterFile(config, denoiser, 0.1 * torch.randn(joints, 3), scale, 1.0 + torch.rand(joints))


@pytest.fixture(scope="module")
def tiny():
    return Lifter(tiny_file())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint on disk."""
    file, path = tiny_file(), tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_lifter_file(path, file.denoiser, file.config, file.pose_mean, file.pose_scale, file.covariance_scale)
    return str(path)


class Oracle:
    """Returns the truth plus given offsets, by recognising the keypoints of the cells."""

    def __init__(self, mocap, offsets, skeleton=H36M_17):
        self.skeleton, self.offsets = skeleton, offsets
        self.covariance_scale = torch.ones(skeleton.num_joints)
        self.cells = [make_cell(mocap, rig, noisy) for rig in RIGS for noisy in (False, True)]
        self.calls = []

    def sampling(self, **overrides):
        return overrides

    def step_table(self, settings):
        return settings

    def __call__(self, keypoints, **options):
        self.calls.append(options)
        (cell,) = (c for c in self.cells if torch.equal(c.keypoints.nan_to_num(), keypoints.nan_to_num()))
        truth = cell.views.poses_3d[:, [j for j in range(17) if self.skeleton is H36M_17 or j != 9]]
        hypotheses = truth[:, None] + self.offsets[:, : options["num_hypotheses"]]

        class Result:
            meta = {"model": "oracle", "num_hypotheses": options["num_hypotheses"]}  # noqa: RUF012

        Result.hypotheses = hypotheses
        return Result


def shifts(*millimetres):
    """Return one offset along z for each hypothesis, of all joints, ``[1, H, 1, 3]``."""
    return torch.tensor([[0.0, 0.0, value / 1000] for value in millimetres]).reshape(1, -1, 1, 3)


class TestScorePoses:
    def test_known_values(self, people):
        cell = make_cell(people, "h36m", False)
        predicted = cell.views.poses_3d.clone()
        predicted[:8] += torch.tensor([0.03, 0.04, 0.0])  # 50 mm on the 8 of the left
        predicted[8:, 1] += torch.tensor([0.0, 0.0, 0.17])  # 170 mm on one of 17 joints of the 4 of the right
        scores = score_poses(predicted, cell)
        assert set(scores) == {"mpjpe", "p_mpjpe", "mpjpe_by_source"}
        assert scores["mpjpe_by_source"] == pytest.approx({"left": 50.0, "right": 10.0}, abs=1e-3)
        # Each pose counts once, whatever its source.
        assert scores["mpjpe"] == pytest.approx((8 * 50.0 + 4 * 10.0) / 12, abs=1e-3)
        assert scores["p_mpjpe"] == pytest.approx(float(p_mpjpe(predicted, cell.views.poses_3d).mean()), abs=1e-3)
        assert 0.5 < scores["p_mpjpe"] < 10.0

    def test_sixteen_joints(self, people):
        cell = make_cell(people, "wild", True)
        predicted = cell.views.poses_3d[:, [j for j in range(17) if j != 9]].clone()
        assert score_poses(predicted, cell)["mpjpe"] == 0.0
        predicted[:, 9] += torch.tensor([0.0, 0.016, 0.0])
        assert score_poses(predicted, cell)["mpjpe"] == pytest.approx(1.0, abs=1e-4)


class TestScoreHypotheses:
    def test_known_values(self, people):
        cell = make_cell(people, "h36m", True)
        truth = cell.views.poses_3d
        hypotheses = truth[:, None] + shifts(10.0, 30.0)
        scores = score_hypotheses(hypotheses, cell, torch.ones(17))
        assert scores["mpjpe"] == pytest.approx(20.0, abs=1e-3)
        assert scores["p_mpjpe"] == pytest.approx(0.0, abs=0.05)
        assert scores["oracle_best_of_n"] == pytest.approx(10.0, abs=1e-3)
        assert scores["energy_score"] == pytest.approx(20.0 - 20.0 / 2, abs=1e-3)
        assert "ece" not in scores and "dispersion" not in scores

    def test_four_hypotheses_have_a_calibration(self, people):
        cell = make_cell(people, "h36m", True)
        hypotheses = cell.views.poses_3d[:, None] + 0.05 * torch.randn(12, 5, 17, 3)
        scores = score_hypotheses(hypotheses, cell, torch.ones(17))
        wide = score_hypotheses(hypotheses, cell, torch.full((17,), 1e6))
        assert scores["dispersion"] == pytest.approx(0.41, abs=0.06)  # 1 / sqrt(5) / sqrt(1 + 1/5)
        # Nothing is ever outside an enormous region: coverage 1 at levels 0.05 to 0.95 is 0.5 too much.
        assert wide["ece"] == pytest.approx(0.5, abs=1e-6) and wide["ece_worst_joint"] == pytest.approx(0.5, abs=1e-6)
        assert scores["ece"] < 0.45 and scores["ece"] <= scores["ece_worst_joint"]

    def test_no_spread(self, people):
        """Equal hypotheses have no finite dispersion; what JSON cannot hold is None, and blank in the table."""
        cell = make_cell(people, "h36m", True)
        hypotheses = cell.views.poses_3d[:, None].repeat(1, 4, 1, 1) + shifts(10.0)
        scores = score_hypotheses(hypotheses, cell, torch.ones(17))
        assert scores["dispersion"] is None
        assert json.loads(json.dumps(scores, allow_nan=False)) == scores
        line = format_table({"cells": {"cell": {"N=4": scores | {"ece": None}}}}).splitlines()[2]
        assert line.split("|")[5].strip() == "10.0" and line.split("|")[7].strip() == ""


class TestEvaluateMocap:
    def test_the_truth_has_no_error(self, people):
        scores = evaluate_mocap(Oracle(people, torch.zeros(1, 10, 1, 3)), people, None)
        assert list(scores["cells"]) == CELLS
        for rows in scores["cells"].values():
            assert list(rows) == ["N=1", "N=10"]
            for row in rows.values():
                assert row["mpjpe"] == row["energy_score"] == row["oracle_best_of_n"] == 0.0
                assert row["p_mpjpe"] < 1e-3
                assert row["mpjpe_by_source"] == {"left": 0.0, "right": 0.0}

    def test_fewer_hypotheses_are_the_first_ones(self, people):
        """N = 1 is the first hypothesis, not the best; N = 3 the mean of the first three."""
        oracle = Oracle(people, shifts(40.0, 10.0, 25.0, 5.0))
        rows = evaluate_mocap(oracle, people, None, num_hypotheses=(1, 3, 4))["cells"]["wild noisy"]
        assert rows["N=1"]["mpjpe"] == pytest.approx(40.0, abs=1e-3)
        assert rows["N=1"]["energy_score"] == rows["N=1"]["oracle_best_of_n"] == rows["N=1"]["mpjpe"]
        assert rows["N=3"]["mpjpe"] == pytest.approx(25.0, abs=1e-3)
        assert rows["N=3"]["oracle_best_of_n"] == pytest.approx(10.0, abs=1e-3)
        assert rows["N=4"]["mpjpe"] == pytest.approx(20.0, abs=1e-3)
        assert ["ece" in rows[f"N={n}"] for n in (1, 3, 4)] == [False, False, True]

    def test_tier_raw(self, people):
        """No intrinsics and no truth reach the model, and no mirrored chains."""
        oracle = Oracle(people, torch.zeros(1, 10, 1, 3))
        scores = evaluate_mocap(oracle, people, None, seed=0, num_inference_steps=7)
        assert scores["tier"] == "raw" and len(oracle.calls) == 4
        for call in oracle.calls:
            assert set(call) == {
                "image_size", "intrinsics", "num_hypotheses", "num_inference_steps", "flip", "seed", "progress"
            }  # fmt: skip
            assert (
                call["intrinsics"] is None
                and call["flip"] is False
                and call["num_hypotheses"] == 10
                and call["num_inference_steps"] == 7
            )

    def test_end_to_end(self, tiny, people, training):
        scores = evaluate_mocap(tiny, people, training, num_hypotheses=(1, 4), num_poses=9, seed=3)
        json.dumps(scores, allow_nan=False)
        assert scores["num_poses"] == 9 and scores["num_reference_poses"] == 100 and scores["num_joints"] == 17
        assert scores["seed"] == scores["settings"]["seed"] == 3
        assert scores["settings"]["num_hypotheses"] == [1, 4] and scores["settings"]["flip"] is False
        poses = choose_poses(people, 9, 3)
        assert sorted(poses.source) == ["left"] * 5 + ["right"] * 4
        for rig in RIGS:
            for noisy in (False, True):
                cell = make_cell(poses, rig, noisy, 3)
                rows = scores["cells"][cell.name]
                assert list(rows) == ["N=1", "N=4", "mean pose", "nearest 2D pose"]
                lifted = tiny(
                    cell.keypoints, image_size=cell.views.image_size, num_hypotheses=4, flip=False, seed=3
                ).hypotheses
                truth = cell.views.poses_3d
                # One hypothesis alone, lifted anew, is the first of four.
                alone = tiny(cell.keypoints, image_size=cell.views.image_size, num_hypotheses=1, flip=False, seed=3)
                for name, pose in (("N=1", alone.mean), ("N=4", lifted.mean(dim=1))):
                    assert rows[name]["mpjpe"] == pytest.approx(float(mpjpe(pose, truth).mean()), rel=1e-4)
                    assert rows[name]["p_mpjpe"] == pytest.approx(float(p_mpjpe(pose, truth).mean()), rel=1e-4)
                assert rows["N=4"]["energy_score"] == pytest.approx(float(energy_score(lifted, truth).mean()), rel=1e-4)
                bank = PoseBank(training)
                for name, pose in (("mean pose", bank.mean_pose(cell)), ("nearest 2D pose", bank.nearest_pose(cell))):
                    assert rows[name]["mpjpe"] == pytest.approx(float(mpjpe(pose, truth).mean()), rel=1e-6)
                for row in rows.values():
                    by_source = row["mpjpe_by_source"]
                    assert row["mpjpe"] == pytest.approx((5 * by_source["left"] + 4 * by_source["right"]) / 9)

    def test_a_reference_that_is_not_in_metres(self, tiny, people, training):
        wrong = replace(training, positions=1000.0 * training.positions)
        with pytest.raises(
            InputError, match=r"anybody of the reference, people of up to .* are the positions in metres"
        ):
            evaluate_mocap(tiny, people, wrong, num_hypotheses=(1,), num_poses=9)

    def test_sixteen_joints(self, people, training):
        scores = evaluate_mocap(Lifter(tiny_file("h36m_16")), people, training, num_hypotheses=(1,))
        assert scores["num_joints"] == 16
        assert list(scores["cells"]) == CELLS
        cell = make_cell(people, "h36m", False)
        bank, kept = PoseBank(training), [j for j in range(17) if j != 9]
        for name, poses in (("mean pose", bank.mean_pose(cell)), ("nearest 2D pose", bank.nearest_pose(cell))):
            assert scores["cells"]["h36m clean"][name] == score_poses(poses[:, kept], cell)

    def test_sixteen_joints_of_the_truth(self, people):
        scores = evaluate_mocap(Oracle(people, torch.zeros(1, 10, 1, 3), H36M_16), people, None)
        assert scores["cells"]["wild noisy"]["N=10"]["mpjpe"] == 0.0

    def test_seed_matters(self, tiny, people):
        first, again, other = (
            evaluate_mocap(tiny, people, None, num_hypotheses=(1,), seed=seed)["cells"] for seed in (0, 0, 1)
        )
        assert first == again and first != other

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"num_hypotheses": (1, 0)}, "num_hypotheses must .* at least 1"),
            ({"num_hypotheses": ()}, "num_hypotheses must .* at least 1"),
            ({"num_poses": 0}, "num_poses must be at least 1"),
            ({"num_inference_steps": 0}, "num_inference_steps must be"),
            ({"num_inference_steps": 1001}, "num_inference_steps must be"),
            ({"seed": -1}, "seed must be between 0"),
            ({"seed": 2**32}, "seed must be between 0"),
        ],
    )
    def test_errors_come_first(self, tiny, people, monkeypatch, options, match):
        monkeypatch.setattr("diffupose.evaluation.mocap.make_cell", forbidden)
        with pytest.raises(ValueError, match=match):
            evaluate_mocap(tiny, people, None, **options)


def forbidden(*_, **__):
    raise AssertionError("the long work was begun")


def test_format_table():
    scores = {
        "cells": {
            "h36m": {
                "N=1": {
                    "mpjpe": 72.84, "p_mpjpe": 46.25, "energy_score": 72.84, "oracle_best_of_n": 72.84,
                    "mpjpe_by_source": {"cmu_daz": 80.0, "uiprmd": 60.06},
                },
                "N=10": {
                    "mpjpe": 52.15, "p_mpjpe": 34.7, "energy_score": 34.66, "oracle_best_of_n": 46.4, "ece": 0.1066,
                    "ece_worst_joint": 0.3, "dispersion": 1.216, "spearman": 0.6,
                    "mpjpe_by_source": {"cmu_daz": 60.0, "uiprmd": 40.0},
                },
            },
            "wild": {
                "mean pose": {
                    "mpjpe": 229.3, "p_mpjpe": 192.7, "mpjpe_by_source": {"cmu_daz": 1229.0, "uiprmd": 200.0}
                },
            },
        }
    }  # fmt: skip
    assert format_table(scores).splitlines() == [
        "| cell | pose         | MPJPE | P-MPJPE | energy | oracle best |   ECE | disp. |   rho | cmu_daz | uiprmd |",
        "| ---  | ---          |  ---: |    ---: |   ---: |        ---: |  ---: |  ---: |  ---: |    ---: |   ---: |",
        "| h36m | N=1          |  72.8 |    46.2 |   72.8 |        72.8 |       |       |       |    80.0 |   60.1 |",
        "| h36m | mean of N=10 |  52.1 |    34.7 |   34.7 |        46.4 | 0.107 | 1.216 | 0.600 |    60.0 |   40.0 |",
        "| wild | mean pose    | 229.3 |   192.7 |        |             |       |       |       |  1229.0 |  200.0 |",
    ]


class TestCommand:
    def run(self, *arguments):
        return main(["evaluate", "mocap", "--device", "cpu", *map(str, arguments)])

    @pytest.fixture
    def few(self, tmp_path, people):
        """A file of twelve poses."""
        names, index = np.unique(people.source, return_inverse=True)
        subject = np.full(len(names), "someone")
        np.savez(
            tmp_path / "few.npz",
            positions=people.positions,
            clip_index=index,
            clip_subject=subject,
            clip_source=names,
        )
        return tmp_path / "few.npz"

    def test_bundled_model_and_sample(self, capsys):
        """What a stranger types, with fewer steps: real poses in, errors far below the baselines'."""
        assert self.run("--num-inference-steps", 2, "--num-hypotheses", 1) == 0
        output = capsys.readouterr().out
        assert output.startswith("data: bundled sample, 300 poses a cell; baselines from bundled sample of training")
        assert "1000 poses" in output and "ddim in 2 steps, no flips" in output and "no intrinsics" in output
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line[:1] == "|"]
        assert [row[:2] for row in rows[2:]] == [
            [cell, name] for cell in CELLS for name in ("N=1", "mean pose", "nearest 2D pose")
        ]
        errors = {(row[0], row[1]): float(row[2]) for row in rows[2:]}
        for cell in CELLS:
            assert errors[cell, "N=1"] < 0.8 * errors[cell, "nearest 2D pose"] < 0.8 * errors[cell, "mean pose"]

    def test_json(self, capsys, tmp_path, few, model):
        target = tmp_path / "scores.json"
        target.write_text("old")
        assert self.run("--data", few, "--model", model, "--num-hypotheses", 4, 1, 4, "--json", target) == 0
        output = capsys.readouterr()
        scores = json.loads(target.read_text())
        assert scores["data"] == "few.npz" and scores["reference"] == "bundled sample of training poses"
        assert scores["settings"]["model"] == "tiny" and scores["settings"]["num_hypotheses"] == [1, 4]
        assert scores["num_poses"] == 12 and scores["num_reference_poses"] == 1000
        assert format_table(scores) in output.out
        assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["scores.json"]

    def test_json_is_whole_or_not_there(self, tmp_path, few, model, monkeypatch):
        target = tmp_path / "scores.json"
        target.write_text("old")

        def fail(path, text, **_):
            with open(path, "w") as file:
                file.write(text[: len(text) // 2])
            raise OSError("disk full")

        monkeypatch.setattr("pathlib.Path.write_text", fail)
        assert self.run("--data", few, "--model", model, "--num-hypotheses", 1, "--json", target) == 2
        assert target.read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["few.npz", "scores.json"]

    def test_reference_and_full(self, capsys, tmp_path, few, model):
        assert self.run("--data", few, "--reference", few, "--model", model, "--num-hypotheses", 1, "--full") == 0
        output = capsys.readouterr().out
        assert f"data: {few}, 12 poses a cell; baselines from {few}, 12 poses" in output
        assert "seed 0" in output

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (("--data", "absent.npz"), "absent.npz"),
            (("--reference", "absent.npz"), "absent.npz"),
            (("--num-hypotheses", 0), "--num-hypotheses must be at least 1, got 0"),
            (("--num-hypotheses", 10, -3), "--num-hypotheses must be at least 1, got -3"),
            (("--num-inference-steps", 0), "must be a whole number of at least 1, got 0"),
            (("--data", "text.npz"), "text.npz is not a readable npz"),
            (("--data", "plain.npy"), "plain.npy must be an npz of motion capture"),
            (("--data", "other.npz"), "other.npz must hold 'positions'"),
            (("--model", "absent.safetensors"), "there is no checkpoint 'absent.safetensors'"),
            (("--model", "text.npz"), "text.npz is neither a diffupose checkpoint"),
            (("--regressor", "absent"), "--regressor must be a file or a bundled name (mocap), got 'absent'"),
            (("--regressor", "absent.safetensors"), "there is no checkpoint 'absent.safetensors'"),
            (("--json", "absent/scores.json"), "--json: the folder 'absent' does not exist"),
            (("--json", "."), "--json: '.' is a folder"),
            (("--seed", -1), "seed must be between 0"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
    )
    def test_bad_input(self, arguments, match, capsys, tmp_path, few, model, monkeypatch):
        """Exit code 2 and one line, before anything is lifted."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text.npz").write_text("hello")
        np.save(tmp_path / "plain.npy", np.zeros((3, 17, 3)))
        np.savez(tmp_path / "other.npz", poses=np.zeros((3, 17, 3)))
        monkeypatch.setattr(diffupose.lifting.lifter.Lifter, "__call__", forbidden)
        monkeypatch.setattr("diffupose.evaluation.mocap.make_cell", forbidden)
        assert self.run("--data", few, "--model", model, *arguments) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        assert output.err.startswith("diffupose: error: ") and match in output.err

    def test_millimetres(self, capsys, tmp_path, people, model):
        np.savez(
            tmp_path / "mm.npz",
            positions=1000 * people.positions,
            clip_index=np.zeros(12, dtype=int),
            clip_subject=np.array(["someone"]),
            clip_source=np.array(["lab"]),
        )
        assert self.run("--data", tmp_path / "mm.npz", "--model", model) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "are the positions in metres?" in error
