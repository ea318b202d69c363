"""Object arrays of npz files: what the community writes is read, what could run code is refused and does not run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from diffupose.datasets.unpickle import load_object_array
from diffupose.errors import InputError

HEADER = np.lib.format.header_data_from_array_1_0(np.empty((), dtype=object))


def write_npz(path, stream, key="positions_3d"):
    """Write an npz whose only member is an object array of shape [] with this pickle."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, HEADER)
    member.write(stream)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{key}.npy", member.getvalue())
    return path


def boxed(value):
    """Return an object array of shape [] that holds a value."""
    box = np.empty((), dtype=object)
    box[()] = value
    return box


def assert_same(loaded, expected):
    """Assert that two nested containers of arrays are equal, types included."""
    assert type(loaded) is type(expected)
    if isinstance(expected, dict):
        assert list(loaded) == list(expected)
        for key in expected:
            assert_same(loaded[key], expected[key])
    elif isinstance(expected, (list, tuple)) or (isinstance(expected, np.ndarray) and expected.dtype == object):
        assert len(loaded) == len(expected)
        for one, other in zip(loaded, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert loaded.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")  # NumPy swaps bytes on reading
        np.testing.assert_array_equal(loaded, expected)
    else:
        assert loaded == expected


@pytest.fixture
def nested():
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.arange(3, dtype=np.float32), "text"]
    return {
        "S1": {
            "Directions 1": [np.arange(24, dtype=np.float32).reshape(4, 2, 3), np.zeros((0, 2, 3), dtype=np.float32)],
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "big-endian": np.arange(4, dtype=">f8"),
            "names": np.array(["Hip", "Knee"]),
            "flags": np.array([True, False]),
            "transposed": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
            "ragged": ragged,
        },
        "scalars": (np.float32(0.5), np.int64(7), 3, 2.5, "x", b"raw", b"", None, True),
        "ordered": OrderedDict([("left", [4, 5]), ("right", [1, 2])]),
    }


class TestReads:
    def test_known_values(self, tmp_path):
        np.savez_compressed(tmp_path / "a.npz", positions_3d={"S1": {"Walking": np.array([[1.0, 2.0, 3.0]])}})
        loaded = load_object_array(tmp_path / "a.npz", "positions_3d")
        assert loaded["S1"]["Walking"].tolist() == [[1.0, 2.0, 3.0]]

    def test_what_numpy_writes(self, tmp_path, nested):
        np.savez_compressed(tmp_path / "a.npz", positions_3d=nested, metadata={"num_joints": 17})
        assert_same(load_object_array(tmp_path / "a.npz", "positions_3d"), nested)
        assert load_object_array(str(tmp_path / "a.npz"), "metadata") == {"num_joints": 17}

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_every_protocol(self, tmp_path, nested, protocol):
        path = write_npz(tmp_path / "a.npz", pickle.dumps(boxed(nested), protocol=protocol))
        assert_same(load_object_array(path, "positions_3d"), nested)

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_numpy_before_version_2(self, tmp_path, nested, protocol):
        stream = pickle.dumps(boxed(nested), protocol=protocol)
        if protocol == 2:
            stream = stream.replace(b"numpy._core", b"numpy.core")
        else:
            for module in (b"multiarray", b"numeric"):  # names carry their length, and so does the stream's one frame
                new, old = b"numpy._core." + module, b"numpy.core." + module
                stream = stream.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)
            stream = stream[:3] + struct.pack("<Q", len(stream) - 11) + stream[11:]
        assert b"numpy.core." in stream
        assert b"numpy._core." not in stream
        assert_same(load_object_array(write_npz(tmp_path / "a.npz", stream), "positions_3d"), nested)

    def test_python_2(self, tmp_path):
        # What Python 2 writes for np.savez(path, a={"S1": array([1., 2.], dtype="<f4")}): bytes where 3 has text.
        dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        data = struct.pack("<2f", 1.0, 2.0)
        reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        inner = reconstruct + b"(K\x01(K\x02t" + dtype + b"I00\nU\x08" + data + b"tb"
        objects = b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"
        stream = b"\x80\x02" + reconstruct + b"(K\x01(t" + objects + b"I00\n](}(U\x02S1" + inner + b"uetb."
        path = write_npz(tmp_path / "a.npz", stream)
        loaded = load_object_array(path, "positions_3d")
        assert_same(loaded, {"S1": np.array([1.0, 2.0], dtype=np.float32)})

    @pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.array(3), np.array(["a", "bc"])], ids=str)
    def test_plain_arrays(self, tmp_path, array):
        np.savez(tmp_path / "a.npz", a=array)
        np.testing.assert_array_equal(load_object_array(tmp_path / "a.npz", "a"), array)

    def test_object_array_with_axes(self, tmp_path):
        array = np.empty((2, 1), dtype=object)
        array[0, 0], array[1, 0] = {"a": 1}, [2]
        np.savez(tmp_path / "a.npz", a=array)
        loaded = load_object_array(tmp_path / "a.npz", "a")
        assert loaded.shape == (2, 1)
        assert loaded.tolist() == [[{"a": 1}], [[2]]]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Instance:
    """An object of a class of one's own."""


class Subarray(np.ndarray):
    """An array type of one's own."""


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that the hostile pickles try to create."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ran"


HOSTILE = {
    "system": (lambda: Call(os.system, "touch ran"), r"\.system"),
    "eval": (lambda: Call(builtins.eval, "open('ran', 'w')"), r"__builtin__\.eval|builtins\.eval"),
    "exec": (lambda: Call(builtins.exec, "open('ran', 'w')"), r"__builtin__\.exec|builtins\.exec"),
    "open": (lambda: Call(open, "ran", "w"), r"open"),
    "getattr": (lambda: Call(getattr, "text", "upper"), r"__builtin__\.getattr|builtins\.getattr"),
    "import": (lambda: Call(__import__, "os"), r"__builtin__\.__import__|builtins\.__import__"),
    "numpy function": (lambda: Call(np.save, "ran", [1]), r"numpy\.save"),
    "instance": (Instance, "Instance|_reconstructor"),
    "array subclass": (lambda: np.zeros(2).view(Subarray), "Subarray"),
    "record array": (lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "O")]), "V|record"),
    "nested": (lambda: {"S1": [np.zeros(2), Call(os.system, "touch ran")]}, r"\.system"),
}


class TestRefuses:
    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_objects(self, tmp_path, marker, name, protocol):
        build, match = HOSTILE[name]
        path = write_npz(tmp_path / "a.npz", pickle.dumps(boxed(build()), protocol=protocol))
        with pytest.raises(InputError, match=match):
            load_object_array(path, "positions_3d")
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("stream", "match"),
        [
            (b"cos\nsystem\n(S'touch ran'\ntR.", r"os\.system"),
            (b"(S'touch ran'\nios\nsystem\n.", "object of a class"),
            (b"(cos\nsystem\nS'touch ran'\no.", r"os\.system"),
            (b"\x80\x04\x8c\x05numpy\x8c\x13lib.npyio.os.system\x93\x8c\x09touch ran\x85R.", r"numpy\.lib\.npyio\.os"),
            (b"\x80\x04\x8c\x08builtins\x8c\x10dict.__getattr__\x93.", "builtins.dict.__getattr__"),
            (b"cnumpy\nndarray\n(K\x01tR.", "a call of type"),
            (b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.", "object of a class"),
            (b"\x80\x02cnumpy\nndarray\n}U\x07__doc__U\x01xsb.", "a state for type"),
            (b"\x80\x02cbuiltins\ndict\nN}U\x08__code__U\x01xs\x86b.", "a state for function"),
            (b"\x80\x02U\x01xU\x01y\x85R.", "a call of str"),
            (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xU\x06rot_13\x86R.", "rot_13"),
            (b"\x80\x02cbuiltins\nstr\n]\x85R.", "a call of str"),
            (b"\x80\x02\x82\x01.", "object of a class"),
            (b"Pevil\n.", "object of a class"),
        ],
        ids=["global", "inst", "obj", "dotted", "attribute", "call-ndarray", "newobj", "state-class", "state-function",
             "call-text", "codec", "str-of-list", "extension", "persistent"],
    )  # fmt: skip
    def test_hostile_opcodes(self, tmp_path, marker, stream, match):
        path = write_npz(tmp_path / "a.npz", stream)
        with pytest.raises(InputError, match=match):
            load_object_array(path, "positions_3d")
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("code", "state", "data"),
        [
            ("O8", "(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t", b"U\x08AAAAAAAA"),
            ("f8", "(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t", b"]"),
            ("f8", "(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t", b"U\x04AAAA"),
            ("V8", "(K\x03U\x01|N(U\x01at}U\x01aNsK\x08K\x01K\x00t", b"U\x08AAAAAAAA"),
            ("f8", "(K\x03U\x01<N(U\x01at}K\x08K\x01K\x00t", b"U\x08AAAAAAAA"),
            ("f4,O", "(K\x03U\x01<NNNK\x08K\x01K\x00t", b"U\x08AAAAAAAA"),
        ],
        ids=["bytes-as-objects", "objects-as-bytes", "too-short", "void", "fields", "list"],
    )
    def test_forged_arrays(self, tmp_path, code, state, data):
        dtype = (
            b"cnumpy\ndtype\n(U" + bytes([len(code)]) + code.encode() + b"K\x00K\x01tR" + state.encode("latin1") + b"b"
        )
        stream = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x01t"
        path = write_npz(tmp_path / "a.npz", stream + dtype + b"I00\n" + data + b"tb.")
        with pytest.raises(InputError, match="asks for"):
            load_object_array(path, "positions_3d")


class TestErrors:
    def test_truncated_file(self, tmp_path):
        np.savez_compressed(tmp_path / "a.npz", positions_3d={"S1": np.random.default_rng(0).normal(size=1000)})
        content = (tmp_path / "a.npz").read_bytes()
        for size in (0, 3, 100, len(content) // 2, len(content) - 1):
            (tmp_path / "b.npz").write_bytes(content[:size])
            with pytest.raises(InputError, match=r"b\.npz"):
                load_object_array(tmp_path / "b.npz", "positions_3d")

    def test_truncated_pickle(self, tmp_path):
        stream = pickle.dumps(boxed({"S1": np.zeros(100)}), protocol=4)
        for size in range(len(stream)):
            path = write_npz(tmp_path / "a.npz", stream[:size])
            with pytest.raises(InputError, match=r"positions_3d.*a\.npz"):
                load_object_array(path, "positions_3d")

    def test_changed_bytes(self, tmp_path):
        np.savez(tmp_path / "a.npz", positions_3d={"S1": np.zeros(1000)})
        content = bytearray((tmp_path / "a.npz").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_object_array(tmp_path / "a.npz", "positions_3d")

    def test_trailing_data(self, tmp_path):
        path = write_npz(tmp_path / "a.npz", pickle.dumps(boxed(1)) + b"x")
        with pytest.raises(InputError, match="after its end"):
            load_object_array(path, "positions_3d")

    def test_other_object_than_announced(self, tmp_path):
        path = write_npz(tmp_path / "a.npz", pickle.dumps({"S1": 1}))
        with pytest.raises(InputError, match="holds another"):
            load_object_array(path, "positions_3d")

    def test_missing_member(self, tmp_path):
        np.savez(tmp_path / "a.npz", positions_2d={})
        with pytest.raises(InputError, match=r"no 'positions_3d', only \['positions_2d'\]"):
            load_object_array(tmp_path / "a.npz", "positions_3d")

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_object_array(tmp_path / "a.npz", "positions_3d")

    def test_no_npz(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(3))
        with pytest.raises(InputError, match="not an npz file"):
            load_object_array(tmp_path / "a.npy", "positions_3d")
