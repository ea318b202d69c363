"""Object arrays from npz files without running what is in them.

The research community stores nested dictionaries of arrays with ``np.savez(path, positions_3d=nested)``. NumPy pickles
them, and a pickle can call any function there is. Here a pickle can only build arrays, scalars and plain containers.
"""

from __future__ import annotations

import codecs
import io
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar, cast

import numpy as np

from diffupose.errors import InputError

_DTYPE_CODE = re.compile(r"[<>=|]?[biufcSUO?]\d*")


def _is_shape(shape: object) -> bool:
    """Return whether this is a tuple of non-negative integers."""
    return isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape)


def _plain_dtype(code: object, *_: object) -> np.dtype:
    """``numpy.dtype`` for numbers, text and objects; no records, whose state could pass bytes off as objects."""
    code = code.decode("latin1") if isinstance(code, bytes) else code
    if not isinstance(code, str) or not _DTYPE_CODE.fullmatch(code):
        raise pickle.UnpicklingError(f"the array type {code!r}, which is not allowed")
    # A copy, as its byte order may be set next.
    return cast(Callable[..., np.dtype], np.dtype)(code, False, True)


def _set_byte_order(dtype: np.dtype, state: object) -> None:
    """Set the byte order from a pickled dtype's state and nothing else: the other slots can corrupt memory."""
    if not isinstance(state, tuple) or len(state) < 8 or any(part is not None for part in state[2:5]):
        raise pickle.UnpicklingError("a record array, which is not allowed")
    order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
    if order not in ("<", ">", "=", "|"):
        raise pickle.UnpicklingError(f"the byte order {order!r}")
    if dtype.byteorder != "|":
        own = cast(tuple[Any, ...], dtype.__reduce__()[2])
        cast(Any, dtype).__setstate__((own[0], order, *own[2:]))


def _reconstruct(subtype: object, *_: object) -> np.ndarray:
    """``numpy._core.multiarray._reconstruct``: an empty array, filled by the state that follows."""
    if subtype is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of type {subtype!r}, which is not allowed")
    return np.empty((0,), dtype="i1")


def _fill_array(array: np.ndarray, state: object) -> None:
    """``ndarray.__setstate__`` after checking that shape, type and data belong together."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise pickle.UnpicklingError("an array whose state is not understood")
    version, shape, dtype, fortran, data = state
    if not _is_shape(shape) or not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError("an array without a valid shape and type")
    if isinstance(data, str):
        data = data.encode("latin1")  # bytes of Python 2
    matches = isinstance(data, list if dtype.hasobject else (bytes, bytearray))
    if not matches or len(data) != math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize):
        raise pickle.UnpicklingError(f"an array of shape {shape} and type {dtype} whose data has another size")
    cast(Any, array).__setstate__((version, shape, dtype, bool(fortran), data if dtype.hasobject else bytes(data)))


def _scalar(dtype: object, data: object) -> Any:
    """``numpy._core.multiarray.scalar`` for numbers and text."""
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("a scalar of a type that is not allowed")
    if len(data) != dtype.itemsize:
        raise pickle.UnpicklingError(f"a scalar of type {dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype)[0]


def _from_buffer(data: object, dtype: object, shape: object, order: object, axes: object = None) -> np.ndarray:
    """``numpy._core.numeric._frombuffer``: an array of numbers in pickle protocol 5."""
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, np.dtype) or not _is_shape(shape):
        raise pickle.UnpicklingError("an array whose buffer is not understood")
    flat = np.frombuffer(data, dtype=dtype).copy()
    if order == "K" and isinstance(axes, tuple):
        return flat.reshape(cast(tuple[int, ...], shape)).transpose(axes)
    return flat.reshape(cast(tuple[int, ...], shape), order="F" if order == "F" else "C")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """``_codecs.encode`` as protocol 2 uses it for bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"the text encoding {encoding!r}, which is not allowed")
    return codecs.encode(text, "latin1")


def _empty_bytes() -> bytes:
    """``bytes()``, by which protocol 2 writes an empty byte string."""
    return b""


def _builder(kind: type, argument: tuple[type, ...]) -> Callable[..., Any]:
    """Return ``kind`` as a function of at most one argument of these types: ``str`` of any object may never end."""

    def build(*args: object) -> Any:
        if len(args) > 1 or not all(isinstance(arg, argument) for arg in args):
            raise pickle.UnpicklingError(f"a call of {kind.__name__} that is not allowed")
        return kind(*args)

    return build


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """Return the globals that a pickle may name, each with its stand-in."""
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,  # only ever an argument of _reconstruct, never called
        ("numpy", "dtype"): _plain_dtype,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): _builder(OrderedDict, (list, tuple, dict)),
    }
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        allowed[f"{core}.multiarray", "_reconstruct"] = _reconstruct
        allowed[f"{core}.multiarray", "scalar"] = _scalar
        allowed[f"{core}.numeric", "_frombuffer"] = _from_buffer
    for builtins in ("builtins", "__builtin__"):  # Python 3 and 2
        allowed[builtins, "bytes"] = _empty_bytes
        for container in (dict, list, tuple):
            allowed[builtins, container.__name__] = _builder(container, (list, tuple, dict))
        for name, kind in (("str", str), ("unicode", str), ("int", int), ("long", int), ("float", float)):
            allowed[builtins, name] = _builder(kind, (str, int, float))
    return allowed


_GLOBALS = _allowed_globals()
_CALLABLE = tuple(value for value in _GLOBALS.values() if value is not np.ndarray)

# Python's own unpickler: the C one cannot restrict the state that an object receives. Opcodes that build instances of
# classes are refused: arrays and containers need none.
_REFUSED = (
    pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.EXT1 + pickle.EXT2 + pickle.EXT4
    + pickle.PERSID + pickle.BINPERSID + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER
)  # fmt: skip


class _ArrayUnpickler(pickle._Unpickler):
    """An unpickler of nested containers of arrays; anything else is a ``pickle.UnpicklingError``."""

    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of an allowed global; nothing is imported."""
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"the global {module}.{name}, which is not allowed")
        return _GLOBALS[module, name]

    def load_reduce(self) -> None:
        """Call one of the stand-ins."""
        stack = cast(Any, self).stack
        args = stack.pop()
        function = stack[-1]
        if not any(function is allowed for allowed in _CALLABLE):
            raise pickle.UnpicklingError(f"a call of {type(function).__name__}, which is not allowed")
        stack[-1] = function(*args)

    def load_build(self) -> None:
        """Give an array or a dtype its state."""
        stack = cast(Any, self).stack
        state = stack.pop()
        instance = stack[-1]
        if type(instance) is np.ndarray:
            _fill_array(instance, state)
        elif isinstance(instance, np.dtype):
            _set_byte_order(instance, state)
        else:
            raise pickle.UnpicklingError(f"a state for {type(instance).__name__}, which is not allowed")

    def load_refused(self) -> None:
        """Refuse what builds instances of classes or reaches outside the file."""
        raise pickle.UnpicklingError("an object of a class, which is not allowed")

    dispatch.update(dict.fromkeys(_REFUSED, load_refused))
    dispatch.update({pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build})


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of an npy file and return shape and type."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"npy version {version} is not supported")
    return shape, dtype


def _read_member(archive: zipfile.ZipFile, member: str) -> Any:
    """Read one npy member, an object array by the restricted unpickler."""
    with archive.open(member) as stream:
        shape, dtype = _read_header(stream)
        if dtype == np.dtype(object):
            # "latin1" keeps the bytes of arrays that Python 2 has pickled.
            array = _ArrayUnpickler(stream, encoding="latin1").load()
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                raise ValueError(f"its header announces an object array of shape {shape}, its pickle holds another")
            if stream.read(1):  # also makes zipfile compare the checksum
                raise ValueError("there is data after its end")
            return array.item() if array.ndim == 0 else array
    if dtype.hasobject:
        raise pickle.UnpicklingError("a record array with objects, which is not allowed")
    with archive.open(member) as stream:
        return np.lib.format.read_array(io.BufferedReader(cast(Any, stream)), allow_pickle=False)


def load_object_array(path: str | os.PathLike[str], key: str) -> Any:
    """Return one member of an npz file without running code from it.

    Replaces ``np.load(path, allow_pickle=True)[key]`` (and ``.item()``). A pickle in the file may build arrays of
    numbers, text and objects, NumPy scalars, dictionaries, lists, tuples, numbers and text, written by Python 2 or 3
    and any NumPy; anything else it names is refused before it is imported.

    Args:
        path: The npz file.
        key: Name of the member, for instance ``"positions_3d"``.

    Returns:
        The object itself where the member is an object array of shape ``[]`` (what ``np.savez`` makes of a
        dictionary), else the array.

    Raises:
        InputError: If the file is no npz file, is damaged, has no such member, or if the member's pickle asks for
            anything not listed above; the message names it.
        OSError: If the file cannot be opened.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "poses.npz")
        >>> np.savez(path, positions_3d={"S1": {"Walking": np.zeros((5, 17, 3))}})
        >>> load_object_array(path, "positions_3d")["S1"]["Walking"].shape
        (5, 17, 3)
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [member.removesuffix(".npy") for member in archive.namelist()]
                if key not in members:
                    raise InputError(f"{name!r} has no {key!r}, only {sorted(members)}")
                return _read_member(archive, archive.namelist()[members.index(key)])
        except InputError:
            raise
        except pickle.UnpicklingError as error:
            raise InputError(f"{key!r} in {name!r} asks for {error}") from error
        except zipfile.BadZipFile as error:
            raise InputError(f"{name!r} is not an npz file or is damaged: {error}") from error
        # A damaged or hostile pickle can fail in any way: each of them means a bad file.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{key!r} in {name!r} cannot be read: {reason}") from error
