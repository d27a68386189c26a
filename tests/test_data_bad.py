"""Wrong, damaged and hostile input: one clear line, nothing run, nothing written."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from dcgan.data import open_images
from dcgan.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def png(size=8, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, (size, size)).save(file, "PNG", **options)
    return file.getvalue()


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zipped(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(path, array):
    np.save(path, array, allow_pickle=True)
    return path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def idx(n, h, w, pixels, magic=0x803):
    return struct.pack(">4I", magic, n, h, w) + pixels


def cifar_folder(path, batch, name="data_batch_{}"):
    for i in range(1, 6):
        put(path / name.format(i), batch)
    return path


def encrypted(path):
    zipped(path, {"a.png": png()})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the flag in the central directory
    return put(path, content)


def tar(path, name, content):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


BYTES = np.zeros((4, 8, 8, 3), np.uint8)
BAD = {  # what is wrong → what makes the spec, and a part of the message
    "nothing": (lambda t: "", "no such file"),
    "a name with a typing error": (lambda t: "minst", "accepted are digits, mnist, fashion-mnist, cifar10"),
    "a missing folder": (lambda t: t / "none", "no such file or folder"),
    "a zero byte": (lambda t: "a\0b", "no such file"),
    "no such user": (lambda t: "~nobody-of-this-name/x", "cannot be opened"),
    "a name far too long": (lambda t: "x" * 5000, "cannot be opened"),
    "a control sequence": (lambda t: "\x1b[2J", r"\x1b[2J"),
    "an empty folder": (lambda t: t, "no pictures in it"),
    "a folder without pictures": (lambda t: put(t / "a.txt").parent, "no pictures in it"),
    "only hidden pictures": (lambda t: put(t / ".git/a.png", png()).parent.parent, "no pictures in it"),
    "a text file": (lambda t: put(t / "a.txt"), "not a set of pictures"),
    "a single picture": (lambda t: put(t / "a.png", png()), "not a set of pictures"),
    "a device": (lambda t: "/dev/zero", "not a set of pictures"),
    "an unreadable picture of one": (lambda t: put(t / "a.png", b"text").parent, "1 of 1 pictures cannot be read"),
    "a broken link": (lambda t: (t / "a.png").symlink_to("b") or t, "a.png: No such file"),
    "an empty zip": (lambda t: zipped(t / "a.zip", {}), "no pictures in it"),
    "a zip that is none": (lambda t: put(t / "a.zip", b"PK\3\4 and so on"), "not a zip archive"),
    "a cut zip": (
        lambda t: put(t / "a.zip", zipped(t / "b.zip", {"a.png": png()}).read_bytes()[:-30]),
        "not a zip archive",
    ),
    "an encrypted zip": (lambda t: encrypted(t / "a.zip"), "a.png is encrypted"),
    "a zip of text": (lambda t: zipped(t / "a.zip", {"a.txt": "x"}), "no pictures in it"),
    "names out of the zip": (
        lambda t: zipped(t / "a.zip", {"../a.png": png(), "/b.png": png(), "c:\\d.png": png(), "e/../../f.png": png()}),
        "../a.png: its name leads out",
    ),
    "one name out of the zip": (lambda t: zipped(t / "a.zip", {"a.png": png(), "../b.png": png()}), "1 of 2"),
    "another compression": (lambda t: zipped(t / "a.zip", {"a.png": png()}, zipfile.ZIP_LZMA), "compression method 14"),
    "an idx file cut off": (
        lambda t: put(t / "train-images-idx3-ubyte", idx(9, 8, 8, bytes(500))).parent,
        "is cut off",
    ),
    "an idx file too long": (lambda t: put(t / "train-images-idx3-ubyte", idx(9, 8, 8, bytes(999))), "has data after"),
    "an idx file of labels": (
        lambda t: put(t / "train-images-idx3-ubyte", idx(9, 8, 8, bytes(576), magic=0x801)),
        "begins with 00000801",
    ),
    "an empty idx file": (lambda t: put(t / "train-images-idx3-ubyte"), "begins with"),
    "an idx file of no pictures": (lambda t: put(t / "train-images-idx3-ubyte", idx(0, 8, 8, b"")), "begins with"),
    "an idx file that promises terabytes": (
        lambda t: put(t / "train-images-idx3-ubyte.gz", gzip.compress(idx(2**32 - 1, 2**16, 2**16, b"\0"))),
        "is cut off",
    ),
    "a cut gzip": (
        lambda t: put(t / "train-images-idx3-ubyte.gz", gzip.compress(idx(9, 8, 8, os.urandom(576)))[:-60]),
        "cannot be read",
    ),
    "no gzip": (lambda t: put(t / "train-images-idx3-ubyte.gz", idx(9, 8, 8, bytes(576))), "cannot be read"),
    "an npy of objects": (lambda t: npy(t / "a.npy", np.array([{}, []], object)), "not a .npy file"),
    "an npy that is none": (lambda t: put(t / "a.npy", b"text"), "not a .npy file"),
    "a cut npy": (lambda t: put(t / "a.npy", npy(t / "b.npy", BYTES).read_bytes()[:-1]), "not a .npy file"),
    "integers": (lambda t: npy(t / "a.npy", BYTES.astype(int)), "int64 of shape (4, 8, 8, 3); accepted is uint8"),
    "booleans": (lambda t: npy(t / "a.npy", BYTES > 0), "accepted is uint8"),
    "complex numbers": (lambda t: npy(t / "a.npy", BYTES * 1j), "accepted is uint8"),
    "floats from -1": (lambda t: npy(t / "a.npy", BYTES - 1.0), "values from -1 to -1"),
    "floats to 255": (lambda t: npy(t / "a.npy", BYTES + 255.0), "values from 255 to 255"),
    "not a number": (lambda t: npy(t / "a.npy", BYTES + np.nan), "values from nan"),
    "rows": (lambda t: npy(t / "a.npy", np.zeros((9, 784), np.uint8)), "of shape (9, 784)"),
    "two channels": (lambda t: npy(t / "a.npy", np.zeros((9, 8, 8, 2), np.uint8)), "C = 1, 3 or 4"),
    "no pictures": (lambda t: npy(t / "a.npy", BYTES[:0]), "holds no pictures"),
    "no pixels": (lambda t: npy(t / "a.npy", BYTES[:, :0]), "holds no pictures"),
    "an npz of labels": (lambda t: npz(t / "a.npz", y=np.zeros(9)), "holds y float64(9,); accepted is a key `images`"),
    "an npz of two sets": (lambda t: npz(t / "a.npz", train=BYTES, test=BYTES), "holds train uint8(4, 8, 8, 3), test"),
    "an empty npz": (lambda t: npz(t / "a.npz"), "holds nothing"),
    "an npz of objects": (lambda t: npz(t / "a.npz", images=np.array([{}], object)), "not a .npz file"),
    "an npz that is none": (lambda t: put(t / "a.npz", b"text"), "not a .npz file"),
    "an npz of text": (lambda t: zipped(t / "a.npz", {"images.npy": b"text"}), "not a .npz file"),
    "four batches": (lambda t: os.unlink(cifar_folder(t, b"") / "data_batch_3") or t, "without data_batch_3"),
    "empty batches": (lambda t: cifar_folder(t, b""), "data_batch_1 is not a batch of CIFAR-10"),
    "empty records": (lambda t: cifar_folder(t, b"", "data_batch_{}.bin"), "data_batch_1.bin is not a batch"),
    "cut records": (
        lambda t: cifar_folder(t, bytes(3072), "data_batch_{}.bin"),
        "3072 bytes are not a whole number of",
    ),
    "records of CIFAR-100": (lambda t: cifar_folder(t, b"\x63" * 3073, "data_batch_{}.bin"), "the label 99"),
    "a pickle without data": (lambda t: cifar_folder(t, pickle.dumps({"labels": []}, 2)), "no `data`"),
    "a pickle that is a list": (lambda t: cifar_folder(t, pickle.dumps([1], 2)), "data_batch_1 is not a batch"),
    "a pickle of floats": (lambda t: cifar_folder(t, pickle.dumps({"data": np.zeros((9, 3072))}, 2)), "unsigned bytes"),
    "a pickle of squares": (lambda t: cifar_folder(t, pickle.dumps({"data": BYTES}, 2)), "no `data`"),
    "a tar without batches": (lambda t: tar(t / "a.tar.gz", "a.png", png()), "accepted are data_batch_1"),
    "a tar that is none": (lambda t: put(t / "a.tar.gz", gzip.compress(b"text" * 999)), "not a .tar.gz"),
    "a gzip that is none": (lambda t: put(t / "a.tgz", b"text"), "not a .tar.gz"),
    "a cut tar": (
        lambda t: put(t / "a.tgz", tar(t / "b.tgz", "data_batch_1", os.urandom(9999)).read_bytes()[:-2000]),
        "not a .tar.gz that can be read",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_the_argument(tmp_path, case):
    make, part = BAD[case]
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError) as caught:
        open_images(str(make(tmp_path / "set")), 16, progress=False)
    message = str(caught.value)
    assert message.startswith("--data ") and part in message
    assert message.isprintable() and len(message) < 1200
    assert not list((tmp_path / "xdg").rglob("*.*")), "nothing is cached"


def test_sizes_and_channels_out_of_range():
    for size in (0, -1, 5000):
        with pytest.raises(InputError, match=f"--image-size {size}: accepted are 1 to 1024"):
            open_images("digits", size)
    with pytest.raises(InputError, match="channels 2: accepted are 1, 3 and 4"):
        open_images("digits", 16, 2)
