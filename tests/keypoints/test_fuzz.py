"""Whatever the bytes are, reading gives keypoints or one InputError."""

import numpy as np
import pytest

from diffupose.errors import InputError
from diffupose.keypoints import read_keypoints

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
numbers = st.lists(st.none() | st.floats() | st.integers(-2000, 2000), min_size=51, max_size=51)
entries = st.fixed_dictionaries(
    {"image_id": st.integers() | st.text(max_size=3) | values, "keypoints": numbers | values},
    optional={"score": st.floats() | values},
)
images = st.lists(st.fixed_dictionaries({"id": values}, optional={"width": values, "height": values}), max_size=3)
bodies = st.fixed_dictionaries({"pose_keypoints_2d": numbers | values})
documents = (
    values
    | st.lists(entries, max_size=4)
    | st.fixed_dictionaries(
        {"annotations": values | st.lists(entries, max_size=4)}, optional={"images": images | values}
    )
    | st.fixed_dictionaries({"people": values | st.lists(bodies, max_size=4)})
)
many = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def read_or_refuse(path):
    try:
        result = read_keypoints(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    present = result.keypoints[..., 2] > 0
    assert present.any(axis=1).all()
    assert np.isfinite(result.keypoints[present]).all() and np.isnan(result.keypoints[~present][:, :2]).all()
    assert (result.keypoints[..., 2] <= 1).all()
    assert result.num_frames - result.num_empty_frames == len(set(result.image_id.tolist()))


@many
@given(document=documents)
def test_json(files, document):
    read_or_refuse(files.json(document))


@many
@given(
    content=st.binary(max_size=200), head=st.sampled_from([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00", b"PK\x03\x04"])
)
def test_bytes(files, content, head):
    read_or_refuse(files.bytes(head + content))


@many
@given(position=st.integers(0, 2000), change=st.binary(min_size=1, max_size=4))
def test_changed_npz(files, position, change):
    content = bytearray(files.npz(keypoints=np.linspace(1, 900, 102).reshape(3, 17, 2)).read_bytes())
    position %= len(content)
    content[position : position + len(change)] = change
    read_or_refuse(files.bytes(bytes(content)))
