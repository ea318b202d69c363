"""Motion-capture files: what is read and what is refused."""

from __future__ import annotations

import random
from importlib import resources

import numpy as np
import pytest

from diffupose.datasets.mocap import SAMPLE_SUBJECTS, SELECTION_SUBJECTS, Mocap, load_mocap
from diffupose.errors import InputError

SUBJECTS = ("ann", "bob", "cem", "ann")
LENGTHS = (3, 2, 4, 1)


def arrays():
    clip_index = np.repeat(np.arange(4, dtype=np.int32), LENGTHS)
    return {
        "positions": np.random.default_rng(0).normal(size=(10, 17, 3)).astype(np.float32),
        "clip_index": clip_index,
        "clip_subject": np.array(SUBJECTS),
        "clip_source": np.array(["lab", "lab", "field", "field"]),
        "joint_names": np.array(["unused"]),
    }


def write(path, **changes):
    """Write a good file with some arrays changed or, where None, left out; return its path."""
    content = {name: value for name, value in (arrays() | changes).items() if value is not None}
    np.savez_compressed(path / "mocap.npz", **content)
    return path / "mocap.npz"


def test_load(tmp_path):
    mocap = load_mocap(write(tmp_path))
    assert np.array_equal(mocap.positions, arrays()["positions"]) and mocap.positions.dtype == np.float32
    assert mocap.subject.tolist() == ["ann"] * 3 + ["bob"] * 2 + ["cem"] * 4 + ["ann"]
    assert mocap.source.tolist() == ["lab"] * 5 + ["field"] * 5


def test_float64_becomes_float32(tmp_path):
    mocap = load_mocap(write(tmp_path, positions=arrays()["positions"].astype(np.float64)))
    assert mocap.positions.dtype == np.float32


@pytest.mark.parametrize(
    ("include", "exclude", "rows"),
    [
        (("ann",), (), [0, 1, 2, 9]),
        (("bob", "cem"), (), [3, 4, 5, 6, 7, 8]),
        (None, ("ann",), [3, 4, 5, 6, 7, 8]),
        (("ann", "bob"), ("bob",), [0, 1, 2, 9]),
        (None, ("nobody",), list(range(10))),
    ],
)
def test_include_and_exclude(tmp_path, include, exclude, rows):
    mocap = load_mocap(write(tmp_path), include=include, exclude=exclude)
    assert np.array_equal(mocap.positions, arrays()["positions"][rows])
    assert mocap.subject.tolist() == np.repeat(SUBJECTS, LENGTHS)[rows].tolist()


def test_select():
    mocap = Mocap(np.arange(3 * 51).reshape(3, 17, 3), np.array(list("abc")), np.array(list("xyz")))
    for index in (np.array([2, 0]), np.array([True, False, True])):
        chosen = mocap.select(index)
        assert np.array_equal(chosen.positions, mocap.positions[index])
        assert chosen.subject.tolist() == mocap.subject[index].tolist()
        assert chosen.source.tolist() == mocap.source[index].tolist()


def bad_positions(value):
    positions = arrays()["positions"]
    positions[4, 3, 1] = value
    return positions


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"positions": None}, "must hold 'positions', it holds clip_index, clip_source"),
        ({"clip_source": None}, "must hold 'clip_source'"),
        ({"positions": np.zeros((10, 16, 3))}, r"of shape \[F, 17, 3\], got float64 \(10, 16, 3\)"),
        ({"positions": np.zeros((10, 51))}, r"of shape \[F, 17, 3\]"),
        ({"positions": bad_positions(np.nan)}, "must be finite"),
        ({"positions": bad_positions(np.inf)}, "must be finite"),
        ({"positions": np.zeros((10, 17, 3), dtype=complex)}, "must be finite numbers .* complex128"),
        ({"positions": np.full((10, 17, 3), "0")}, "must be finite numbers .* <U1"),
        ({"positions": arrays()["positions"].astype(object)}, "pickled objects, which are never loaded"),
        ({"clip_subject": np.array(SUBJECTS, dtype=object)}, "pickled objects, which are never loaded"),
        ({"positions": np.zeros((0, 17, 3)), "clip_index": np.zeros(0, dtype=int)}, "no pose of .* is left"),
        ({"clip_index": np.zeros(9, dtype=int)}, r"integers of shape \(10,\), got int64 \(9,\)"),
        ({"clip_index": np.zeros((10, 1), dtype=int)}, r"integers of shape \(10,\)"),
        ({"clip_index": np.zeros(10)}, r"integers of shape \(10,\), got float64"),
        ({"clip_index": np.full(10, 4)}, r"below 4, .* got 4\.\.4"),
        ({"clip_index": np.full(10, -1)}, r"not negative, got -1\.\.-1"),
        ({"clip_subject": np.arange(4)}, "must be texts"),
        ({"clip_source": np.array(["lab"])}, r"of one shape \[C\]"),
        ({"clip_source": np.array("lab")}, r"of one shape \[C\]"),
    ],
)
def test_refused(tmp_path, changes, match):
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=match) as error:
        load_mocap(path)
    assert str(path) in str(error.value)


def test_unknown_subject(tmp_path):
    with pytest.raises(InputError, match=r"subject 'dan' is not in .*mocap.npz, which has ann, bob, cem"):
        load_mocap(write(tmp_path), include=("ann", "dan"))


def test_nothing_left(tmp_path):
    with pytest.raises(InputError, match=r"no pose of .* is left"):
        load_mocap(write(tmp_path), include=("ann",), exclude=("ann",))


def test_other_files(tmp_path):
    np.save(tmp_path / "plain.npy", arrays()["positions"])
    with pytest.raises(InputError, match="must be an npz of motion capture, got a plain array"):
        load_mocap(tmp_path / "plain.npy")
    (tmp_path / "text.npz").write_text("positions")
    with pytest.raises(InputError, match=r"text.npz is not a readable npz"):
        load_mocap(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        load_mocap(tmp_path / "absent.npz")


def test_damaged_files(tmp_path):
    """Whatever is broken: the right arrays or an InputError."""
    content, generator = write(tmp_path).read_bytes(), random.Random(0)
    refused = 0
    for trial in range(400):
        damaged = bytearray(content)
        if trial % 4 == 0:
            damaged = damaged[: generator.randrange(len(damaged))]
        for _ in range(generator.randrange(1, 6)):
            if damaged:
                # Most of the structure is in the directory at the end.
                low = 0 if trial % 2 else max(0, len(damaged) - 600)
                damaged[generator.randrange(low, len(damaged))] = generator.randrange(256)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            load_mocap(tmp_path / "damaged.npz")
        except InputError:
            refused += 1
    assert refused > 200


def test_bundled_sample():
    """One person to evaluate on, other people as training poses, and nobody that choices are made on."""
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as path:
        evaluated = load_mocap(path, include=SAMPLE_SUBJECTS)
        reference = load_mocap(path, exclude=SAMPLE_SUBJECTS)
    assert len(evaluated.positions) == 300 and len(reference.positions) == 1000
    assert not set(reference.subject.tolist()) & {*SAMPLE_SUBJECTS, *SELECTION_SUBJECTS}
    for mocap in (evaluated, reference):
        assert set(mocap.source.tolist()) == {"uiprmd"}
        height = np.ptp(mocap.positions[..., 2], axis=1)  # z up, metres
        assert (height > 0.4).all() and (height < 2.3).all() and np.median(height) > 1.2
