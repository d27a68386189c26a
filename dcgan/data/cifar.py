"""CIFAR-10 in its python and its binary form, from a folder or the .tar.gz. Source: Krizhevsky 2009, the CIFAR-10 page.

The python form is pickles, and a pickle is a program. `BatchUnpickler` runs the part of the language that builds data
and nothing else: of the opcodes those in `OPCODES`, of the names those that NumPy writes for an array, and each of
these is bound to a few lines of this file, so that a file can call neither Python nor NumPy.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from dcgan.data.arrays import ArraySource
from dcgan.data.source import shown
from dcgan.errors import InputError

PYTHON = tuple(f"data_batch_{i}" for i in range(1, 6))
BINARY = tuple(f"{name}.bin" for name in PYTHON)
PIXELS = 3 * 32 * 32  # of a picture: the red plane, the green, the blue
BATCH_CAP = 64 * 2**20  # bytes of a batch; the real ones have 31 MB
ARCHIVE_CAP = 512 * 2**20  # bytes of the unpacked archive; the real one has 186 MB
MEMBER_CAP = 100  # of the archive; the real one has 9

OPCODES = (
    "PROTO FRAME MARK STOP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINSTRING BINSTRING "
    "SHORT_BINBYTES BINBYTES BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE "
    "BUILD"
)
CODES = [getattr(pickle, name)[0] for name in OPCODES.split()]


class _Dtype:
    """Stands in for numpy.dtype, of which only unsigned bytes are accepted."""

    __slots__ = ("name",)

    def __init__(self, name: object, *flags: object):
        self.name = name.decode("latin-1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands in for the array that numpy's _reconstruct makes and BUILD fills."""

    __slots__ = ("data",)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, column_major, data = state
        data = data.encode("latin-1") if isinstance(data, str) else data
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "|u1"):
            raise pickle.UnpicklingError("an array of something other than unsigned bytes")
        self.data = np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_major else "C")


class _Name:
    """What a pickle gets for a global name: to be called by REDUCE, and nothing else, not even to be changed."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the state of a name is set")


def _encoded(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` is in a pickle: Python 3 writes bytes so for readers of protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("_codecs.encode of something other than bytes")
    return text.encode("latin-1")


NAMES = {"numpy ndarray": _Name(lambda *_: None), "numpy dtype": _Name(_Dtype), "_codecs encode": _Name(_encoded)}
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before NumPy 2, and since
    NAMES[f"{module} _reconstruct"] = _Name(lambda *_: _Array())


class BatchUnpickler(pickle._Unpickler):
    """Reads lists, dictionaries, strings, bytes, numbers and arrays of unsigned bytes.

    The standard library's unpickler in Python, for its table of opcodes, which can be cut; besides, its memo is a
    dictionary, so that no file can have it grow to gigabytes with one number.

    Raises:
        Exception: of many kinds, for a file that is anything else.
    """

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes)):  # sixty nested tuples take years to hash
                raise pickle.UnpicklingError("a key that is not a string")
            self.stack[-1][key] = value

    def load_setitem(self) -> None:
        self.metastack.append(self.stack[:-2])
        self.stack = self.stack[-2:]
        self.load_setitems()

    dispatch = MappingProxyType(
        {code: pickle._Unpickler.dispatch[code] for code in CODES}
        | {pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem}
    )

    def find_class(self, module: str, name: str) -> _Name:
        if f"{module} {name}" not in NAMES:
            raise pickle.UnpicklingError(f"the file names {module}.{name}, which no batch of pictures needs")
        return NAMES[f"{module} {name}"]


def _python(file: BinaryIO) -> np.ndarray:
    batch = BatchUnpickler(io.BytesIO(file.read(BATCH_CAP)), encoding="bytes").load()
    data = batch.get(b"data", batch.get("data"))
    if not isinstance(data, _Array) or data.data.ndim != 2 or data.data.shape[1] != PIXELS or not len(data.data):
        raise pickle.UnpicklingError(f"no `data`, an array of N × {PIXELS} unsigned bytes")
    return data.data


def _binary(file: BinaryIO) -> np.ndarray:
    """Records of a label, 0 to 9, and the pixels."""
    data = np.frombuffer(file.read(BATCH_CAP), np.uint8)
    if not data.size or data.size % (PIXELS + 1):
        raise ValueError(f"{data.size} bytes are not a whole number of {PIXELS + 1}-byte records; is the file cut off?")
    records = data.reshape(-1, PIXELS + 1)
    if records[:, 0].max() > 9:
        raise ValueError(f"the label {records[:, 0].max()} is outside 0 to 9")
    return records[:, 1:]


def _read(name: str, file: BinaryIO, where: str) -> np.ndarray:
    """One batch, uint8 (N, 3072)."""
    try:
        return (_binary if name.endswith(".bin") else _python)(file)
    except Exception as error:  # whatever a damaged or hostile file leads to
        why = shown(error) or type(error).__name__
        raise InputError(f"--data {where}: {name} is not a batch of CIFAR-10 ({why})") from error


def _pictures(batches: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(batches).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def find(folder: Path) -> list[Path]:
    """The batches in a folder, none where it is no CIFAR-10.

    Raises:
        InputError: some are there and some are not.
    """
    for names in (PYTHON, BINARY):
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return [folder / name for name in names]
        if len(missing) < len(names):
            raise InputError(f"--data {folder}: CIFAR-10 without {', '.join(missing)}; all five batches are needed")
    return []


def open_folder(files: list[Path], where: str) -> ArraySource:
    """The training pictures of the five batches that `find` returned."""

    def load() -> np.ndarray:
        batches = []
        for path in files:
            with path.open("rb") as file:
                batches.append(_read(path.name, file, where))
        return _pictures(batches)

    return ArraySource(Path(where).name, where, files, load)


class _Capped(io.RawIOBase):
    """A stream that ends with an error after so many bytes: what is packed smaller than it says cannot fill memory."""

    def __init__(self, stream: BinaryIO, left: int):
        self.stream, self.left = stream, left

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {ARCHIVE_CAP} bytes")
        return data


def open_archive(path: Path, name: str, where: str) -> ArraySource:
    """The training pictures of cifar-10-python.tar.gz or cifar-10-binary.tar.gz, read in memory."""

    def load() -> np.ndarray:
        batches: dict[str, np.ndarray] = {}
        try:
            with gzip.open(path) as stream, tarfile.open(fileobj=_Capped(stream, ARCHIVE_CAP), mode="r|") as archive:
                for count, member in enumerate(archive):
                    if count == MEMBER_CAP:
                        raise tarfile.ReadError(f"it has more than {MEMBER_CAP} members")
                    base = member.name.rsplit("/", 1)[-1]
                    if member.isreg() and base in PYTHON + BINARY:
                        batches[base] = _read(base, archive.extractfile(member), where)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise InputError(f"--data {where}: not a .tar.gz that can be read ({shown(error)})") from error
        for names in (PYTHON, BINARY):
            if all(name in batches for name in names):
                return _pictures([batches[name] for name in names])
        raise InputError(f"--data {where}: not a form of CIFAR-10; accepted are {PYTHON[0]} … 5 or {BINARY[0]} … 5.bin")

    return ArraySource(name, where, [path], load)
