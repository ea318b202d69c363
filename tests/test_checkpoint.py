"""Checkpoints: there and back, and files that are damaged or something else."""

from __future__ import annotations

import json
import pickle
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.released_checkpoint import write_released_checkpoint
from support.tiny_lifters import tiny_config, write_tiny_lifter

from diffupose.checkpoint import FORMAT, save_lifter_file
from diffupose.errors import InputError
from diffupose.networks.build import build_denoiser, load_lifter_file


def parts(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_lifter(tmp_path / "tiny.safetensors")


@pytest.mark.parametrize("skeleton", ["h36m_17", "h36m_16", "humaneva_15"])
@pytest.mark.parametrize("kind", ["person", "image"])
def test_there_and_back(tmp_path, kind, skeleton):
    path = tmp_path / "tiny.safetensors"
    config = tiny_config(kind, skeleton)
    denoiser = build_denoiser(config.denoiser)
    joints = int(skeleton[-2:])
    mean, scale, covariance = torch.randn(joints, 3), torch.rand(joints, 3), torch.rand(joints)
    save_lifter_file(path, denoiser, config, mean, scale, covariance)
    file = load_lifter_file(path)
    assert file.config == config
    assert torch.equal(file.pose_mean, mean) and torch.equal(file.pose_scale, scale)
    assert torch.equal(file.covariance_scale, covariance)
    expected = denoiser.state_dict()
    assert file.denoiser.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in file.denoiser.state_dict().items())
    assert not file.denoiser.training
    assert not any(parameter.requires_grad for parameter in file.denoiser.parameters())


def test_prediction_error_there_and_back(tmp_path, tiny):
    file = load_lifter_file(tiny)
    assert file.prediction_error is None
    path, error = tmp_path / "measured.safetensors", torch.rand(50, 17, 3)
    save_lifter_file(path, file.denoiser, file.config, file.pose_mean, file.pose_scale, None, error)
    assert torch.equal(load_lifter_file(path).prediction_error, error)
    save_lifter_file(path, file.denoiser, file.config, file.pose_mean, file.pose_scale, None, error[:-1])
    with pytest.raises(
        InputError, match=r"prediction_error in .* must be finite, of shape \[50, 17, 3\], got \[49, 17, 3\]"
    ):
        load_lifter_file(path)


def test_half_precision_halves_the_file(tmp_path, tiny):
    file = load_lifter_file(tiny)
    small = tmp_path / "small.safetensors"
    save_lifter_file(small, file.denoiser, file.config, file.pose_mean, file.pose_scale, dtype=torch.float16)
    assert small.stat().st_size < 0.65 * tiny.stat().st_size
    again = load_lifter_file(small)
    for name, value in again.denoiser.state_dict().items():
        assert value.dtype == file.denoiser.state_dict()[name].dtype
        assert torch.allclose(value, file.denoiser.state_dict()[name], rtol=1e-3, atol=1e-6)
    assert torch.equal(again.pose_mean, file.pose_mean)  # statistics stay exact
    assert torch.equal(again.covariance_scale, torch.ones(17))


def test_others_may_read_it(tmp_path, tiny):
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(tiny.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert parts(tiny)[1]["format"] == FORMAT


def test_a_failed_save_leaves_nothing(tmp_path, tiny, monkeypatch):
    file = load_lifter_file(tiny)
    before = tiny.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("diffupose.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_lifter_file(tiny, file.denoiser, file.config, 2 * file.pose_mean, file.pose_scale)
    assert [item.name for item in tmp_path.iterdir()] == [tiny.name]
    assert tiny.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.002, 0.02, 0.5, 0.999])
def test_cut_off(tiny, share):
    content = tiny.read_bytes()
    tiny.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"tiny\.safetensors"):
        load_lifter_file(tiny)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_off_released(tmp_path, share):
    path = tmp_path / "best_model.pt"
    write_released_checkpoint(path, 32, 17, seed=0)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"best_model\.pt"):
        load_lifter_file(path)


def test_changed_bytes_never_escape_as_another_error(tmp_path):
    """Damage is refused with an InputError or, in a weight, goes unnoticed."""
    generator = np.random.default_rng(0)
    ours, released = write_tiny_lifter(tmp_path / "a.safetensors"), tmp_path / "b.pt"
    write_released_checkpoint(released, 32, 17, seed=0)
    refused = 0
    for path in (ours, released):
        content = path.read_bytes()
        for _ in range(15):
            damaged = bytearray(content)
            places = [generator.integers(0, 3000), generator.integers(len(content) - 3000, len(content))]
            for place in places:
                damaged[place] = generator.integers(0, 256)
            path.write_bytes(damaged)
            try:
                load_lifter_file(path)
            except InputError as error:
                refused += 1
                assert path.name in str(error)
    assert refused > 5


def test_random_bytes(tmp_path):
    generator = np.random.default_rng(1)
    path = tmp_path / "noise.pt"
    for length in (0, 1, 8, 9, 17, 300):
        for start in (
            b"",
            b"\x80\x02",
            b"\x80\x02}q\x00",
            b"PK\x03\x04",
            b"(",
            b"\x08\0\0\0\0\0\0\0{",
            b"{}",
            b"ustar",
        ):
            path.write_bytes((start + generator.bytes(length))[: max(length, len(start))])
            with pytest.raises(InputError, match=r"noise\.pt"):
                load_lifter_file(path)


@pytest.mark.parametrize(
    "content",
    [
        {"hello": [1, 2, 3]},
        [1, 2, 3],
        torch.zeros(3),
        {},
        {"model": {"weight": torch.zeros(2)}},
        {"ema": {1: torch.zeros(2)}},
        {"model": None, "ema": 3},
        {"model": {"module.denoise_fn.gconv_input.0.gconv.W": torch.zeros(2, 5, 32)}},
        {
            "model": {
                "module.denoise_fn.gconv_input.0.gconv.W": torch.zeros(2),
                "module.denoise_fn.gconv_input.0.gconv.M": torch.zeros(17),
            }
        },
    ],
    ids=["dict", "list", "tensor", "empty", "other", "ints", "none", "one", "shapes"],
)
def test_torch_files_of_something_else(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=r"other\.pt"):
        load_lifter_file(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_pickles(tmp_path, protocol):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"a": np.zeros(3), "b": replace}, protocol=protocol))
    message = r"model\.pkl is neither a diffupose checkpoint .*: it is damaged"
    with pytest.raises(InputError, match=message) as caught:
        load_lifter_file(path)
    assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_modules_are_never_loaded(tmp_path):
    """Torch's own message is an advice to run their code, in bold letters."""
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(InputError) as caught:
        load_lifter_file(path)
    assert str(caught.value) == (
        f"{path} is neither a diffupose checkpoint nor one of the released code: "
        "it is a pickle with objects or code in it, which are never loaded"
    )


def test_the_state_of_a_run_names_its_lifter(tmp_path):
    torch.save({"format": 1, "train_config": "{}", "denoiser": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=r"the state of a training run.*; its lifter is .*/model\.safetensors"):
        load_lifter_file(tmp_path / "checkpoint.pt")


def test_bytes_at_the_end(tiny):
    with open(tiny, "ab") as file:
        file.write(b"extra")
    with pytest.raises(InputError, match=r"tiny\.safetensors is damaged: "):
        load_lifter_file(tiny)


def test_the_same_bytes_in_every_process(tiny):
    """The order of the metadata changes from process to process in the library."""
    code = (
        "import sys; from diffupose.checkpoint import *; from diffupose.networks.build import *;"
        "file = load_lifter_file(sys.argv[1]);"
        "save_lifter_file(sys.argv[1], file.denoiser, file.config, file.pose_mean, file.pose_scale)"
    )
    contents = set()
    for _ in range(4):
        subprocess.run([sys.executable, "-c", code, str(tiny)], check=True, timeout=120)
        contents.add(tiny.read_bytes())
    assert len(contents) == 1
    (content,) = contents
    assert content.index(b'"config"') < content.index(b'"format"')
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0


def weight(tensors):
    return next(name for name in sorted(tensors) if name.startswith("denoiser.") and name.endswith("weight"))


def set_config(section, name, value):
    def change(tensors, metadata):
        config = json.loads(metadata["config"])
        (config if section is None else config[section])[name] = value
        metadata["config"] = json.dumps(config)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("format"), "is not a diffupose checkpoint: its format is None"),
        (lambda t, m: m.update(format="diffupose-9"), "its format is 'diffupose-9'"),
        (lambda t, m: m.pop("config"), "configuration that cannot be used"),
        (lambda t, m: m.update(config="{"), "configuration that cannot be used"),
        (lambda t, m: m.update(config="[]"), "LifterConfig must be a mapping"),
        (set_config("denoiser", "hidden_dim", 33), "hidden_dim must be"),
        (set_config("denoiser", "skeleton", "cat"), "skeleton must be one of"),
        (set_config("denoiser", "new_setting", 1), "DenoiserConfig has no setting 'new_setting'"),
        (set_config("sampling", "num_hypotheses", 0), "num_hypotheses must be"),
        (set_config(None, "input_normalization", "box"), "input_normalization must be one of"),
        (lambda t, m: t.pop("pose_mean"), "has no tensor 'pose_mean'"),
        (lambda t, m: t.update(pose_scale=torch.ones(16, 3)), r"pose_scale .* of shape \[17, 3\], got \[16, 3\]"),
        (lambda t, m: t["pose_mean"].fill_(torch.nan), "pose_mean .* must be finite"),
        (lambda t, m: t["covariance_scale"].fill_(torch.inf), "covariance_scale .* must be finite"),
        (lambda t, m: t["covariance_scale"].neg_(), "covariance_scale .* must be finite and positive, got -"),
        (lambda t, m: t["pose_scale"].neg_(), "pose_scale .* must be finite and not negative, got -"),
        (lambda t, m: t.update({"denoiser.extra": torch.zeros(1)}), "has the unknown tensor 'extra'"),
        (lambda t, m: t.pop(weight(t)), "lacks tensor"),
        (lambda t, m: t[weight(t)].fill_(torch.nan), "not finite"),
        (lambda t, m: t.update({weight(t): torch.zeros(1, 2, 3)}), r"must have shape .*, got \[1, 2, 3\]"),
        (set_config("denoiser", "hidden_dim", 8_000_000), "a network that cannot be built"),
    ],
)
def test_wrong_contents(tiny, change, message):
    tensors, metadata = parts(tiny)
    change(tensors, metadata)
    save_file(tensors, tiny, metadata)
    with pytest.raises(InputError, match=message) as caught:
        load_lifter_file(tiny)
    assert "tiny.safetensors" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            load_lifter_file(path)
