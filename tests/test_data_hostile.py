"""Damaged and hostile input: skipped and named or refused in one line; nothing run, extracted or filled up."""

import gzip
import io
import os
import pickle
import pickletools
import struct
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dcgan.data import cifar, open_images, pictures, source
from dcgan.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def png(size=8, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, (size, size)).save(file, "PNG", **options)
    return file.getvalue()


def bomb(width, height):
    """A PNG whose header promises any number of pixels, and whose pixels are a few zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zipped(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def idx(n, h, w, pixels, magic=0x803):
    return struct.pack(">4I", magic, n, h, w) + pixels


def cifar_folder(path, batch, name="data_batch_{}"):
    for i in range(1, 6):
        put(path / name.format(i), batch)
    return path


def tar(path, name, content):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


SKIPPED = {  # file → what makes it unreadable, and a part of the reason
    "bomb.png": (bomb(50_000, 50_000), "pixels"),
    "large.png": (bomb(4097, 4096), "at most 16 megapixels"),
    "cut.png": (png(64)[:60], ""),
    "empty.jpg": (b"", "not a picture"),
    "text.jpg": (b"text", "not a picture"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "noise.gif": (b"GIF89a\xff\xff" * 9, ""),
    "float.tif": (None, "floating-point"),
}


@pytest.mark.parametrize("packed", [False, True])
def test_a_few_unreadable_pictures_are_skipped_and_named(tmp_path, capfd, packed):
    """One in a hundred, all kinds: also by a second run, which finds them in the cache."""
    members = {f"{i:03}.png": png() for i in range(99 * len(SKIPPED))}
    for name, (content, _) in SKIPPED.items():
        if content is None:
            file = io.BytesIO()
            Image.new("F", (8, 8)).save(file, "TIFF")
            content = file.getvalue()
        members[name] = content
    spec = tmp_path / "set"
    if packed:
        spec = zipped(tmp_path / "set.zip", members)
    else:
        for name, content in members.items():
            put(spec / name, content)
    for _ in range(2):
        result = open_images(str(spec), 8)
        assert len(result.images) == 99 * len(SKIPPED)
        reasons = dict(line.split(": ", 1) for line in result.skipped)
        assert sorted(reasons) == sorted(SKIPPED)
        assert all(part in reasons[name] for name, (_, part) in SKIPPED.items())
        assert "left out 8 of 800 pictures: bomb.png: " in capfd.readouterr().err

    del members["000.png"]  # and they are more than one in a hundred
    spec = zipped(tmp_path / "worse.zip", members)
    with pytest.raises(InputError, match=r"8 of 799 pictures cannot be read, more than 1 %.*bomb.png: .*"):
        open_images(str(spec), 8, progress=False)


def test_a_fifo_and_a_huge_file_are_not_opened(tmp_path):
    for i in range(100):
        put(tmp_path / "set" / f"{i}.png", png())
    os.mkfifo(tmp_path / "set" / "fifo.png")
    with open(tmp_path / "set" / "huge\n\x1b[2J.png", "wb") as file:  # nor does its name reach a terminal as it is
        file.truncate(2**40)
    result = open_images(str(tmp_path / "set"), 8)
    assert len(result.images) == 100 and result.skipped == (
        rf"huge\n\x1b[2J.png: {2**40} bytes: at most {2**27} are read",
    )


def test_damage_in_a_zip_is_found(tmp_path):
    """One bit of a picture's stored bytes; a local header that is not where the directory says; a size that lies."""
    path = zipped(tmp_path / "a.zip", {f"{i:03}.bmp": bytes(60) for i in range(300)} | {"x.txt": b"", "a.png": png(64)})
    content = path.read_bytes()
    listing = pictures.list_zip(path).pictures
    assert len(listing) == 301
    for change, value in [(listing["a.png"][0][0] + 50, 0x55), (listing["a.png"][0][0], 0x51)]:
        damaged = bytearray(content)
        damaged[change] = value
        put(path, damaged)
        reader = pictures.decode.Reader(str(path))
        reasons, _ = pictures.decode.decode_all(reader, [listing["a.png"][0]], 8, 3)
        reader.close()
        assert "damaged in the archive" in reasons[0]


def test_an_archive_of_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MEMBER_CAP", 3)
    with pytest.raises(InputError, match="4 members; an archive may have 3"):
        open_images(str(zipped(tmp_path / "a.zip", {f"{i}.png": png() for i in range(4)})), 8)


class Run:
    """Pickles to a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def hostile_pickles(sentinel):
    """Ways to run something, or to use up the machine."""
    call = f"touch {sentinel}"
    for protocol in range(6):
        yield pickle.dumps({"data": Run(call)}, protocol)
    for module, name in [
        ("os", "system"),
        ("builtins", "eval"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "scalar"),
    ]:
        yield f"\x80\x02c{module}\n{name}\n".encode() + b"U\x04None\x85R."
        text = f"c{module}\n{name}\n(S'{call}'\ntR."
        yield text.encode()
        yield f"(S'{call}'\ni{module}\n{name}\n.".encode()  # INST
    yield b"\x80\x02cnumpy\nndarray.__init__.__globals__\n."
    yield b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93."
    yield b"\x80\x02cnumpy\ndtype\n}U\x05_callU\x04evilsb."  # BUILD of the name itself
    yield b"\x80\x02cnumpy\ndtype\nN}U\x05_callU\x04evils\x86b."
    yield b"\x80\x02c_codecs\nencode\nU\x01aU\x05idna.\x86R."
    yield b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b"."
    yield b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f."  # BINBYTES8 of 2**63 bytes
    yield b"\x80\x02Nr\xff\xff\xff\xff."  # a memo of 2**32
    yield b"\x80\x02}U\x01a\x85" + b"q\0h\0\x86" * 64 + b"Ns."  # a key of nested pairs: 2**64 to hash
    yield b"\x80\x02" + b"(" * 100_000 + b"."
    yield b"\x80\x02)" + b"\x85" * 100_000 + b"."
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\1%scnumpy\ndtype\nU\2%sK\0K\1\x87RK\0U\3abctb."
    yield array % (b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"u1")
    yield array % (b"K\3\x85", b"O8")
    yield b"\x80\x02Pos\n."  # a persistent id
    yield b"\x80\x02\x82\x01."  # an extension code


def test_no_pickle_is_executed(tmp_path):
    sentinel = tmp_path / "sentinel"
    count = 0
    for i, content in enumerate(hostile_pickles(sentinel)):
        start = time.perf_counter()
        with pytest.raises(InputError, match=r"--data .* is not a batch of CIFAR-10"):
            open_images(str(cifar_folder(tmp_path / str(i), content)), 32)
        assert time.perf_counter() - start < 10, i
        count += 1
    spec = tar(tmp_path / "a.tar.gz", "data_batch_1", pickle.dumps(Run(f"touch {sentinel}")))
    with pytest.raises(InputError, match=r"the file names (posix|nt)\.system"):
        open_images(str(spec), 32)
    assert count > 25 and not sentinel.exists()
    pickle.loads(pickle.dumps(Run(f"touch {sentinel}")))  # the payload does work
    assert sentinel.exists()
    assert cifar.NAMES["numpy dtype"]("u1").name == "u1"


def test_the_opcodes_that_no_batch_needs_are_gone():
    """Above all those that make objects, INST, OBJ, NEWOBJ, and those that look up what is not in the file."""
    refused = [opcode for opcode in pickletools.opcodes if ord(opcode.code) not in cifar.CODES]
    assert {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "EXT1", "DUP", "BINBYTES8"} <= {
        code.name for code in refused
    }
    for opcode in refused:
        with pytest.raises(KeyError):
            cifar.BatchUnpickler(io.BytesIO(b"\x80\x02](" + opcode.code.encode("latin-1") + bytes(20))).load()


@pytest.mark.parametrize("ending", ["zip", "npz", "gz"])
def test_what_unpacks_to_a_thousand_times_its_size(tmp_path, monkeypatch, ending):
    """Refused beyond a gibibyte; here the limit is lower, so that the test is quick."""
    pixels = np.zeros((1000, 100, 100), np.uint8)
    if ending == "zip":
        spec = zipped(tmp_path / "a.zip", {"a.bmp": pixels.tobytes()}, zipfile.ZIP_DEFLATED)
    elif ending == "npz":
        spec = tmp_path / "a.npz"
        np.savez_compressed(spec, images=pixels)
    else:
        spec = put(tmp_path / "train-images-idx3-ubyte.gz", gzip.compress(idx(*pixels.shape, pixels.tobytes())))
    if ending != "zip":
        assert len(open_images(str(spec), 4).images) == 1000
    monkeypatch.setattr(source, "SMALL", 10**6)
    with pytest.raises(InputError, match=r"--data .* unpacks to .* more than 200 times its size"):
        open_images(str(spec), 8)


def test_nothing_of_an_archive_is_extracted(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    zipped(folder / "a.zip", {"../../x.png": png(), "y.png": png()})
    tar(folder / "b.tgz", "../../data_batch_1", b"text")
    before = sorted(tmp_path.rglob("*"))
    for name in ("a.zip", "b.tgz"):
        with pytest.raises(InputError):
            open_images(str(folder / name), 8)
    assert [path for path in sorted(tmp_path.rglob("*")) if "xdg" not in path.parts] == before


def test_a_tar_bomb_ends_at_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "ARCHIVE_CAP", 10**6)
    spec = tar(tmp_path / "a.tgz", "x", bytes(10**7))
    assert spec.stat().st_size < 20_000
    with pytest.raises(InputError, match="unpacks to more than 1000000 bytes"):
        open_images(str(spec), 32)
