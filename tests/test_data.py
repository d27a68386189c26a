"""What `open_images` reads: arrays, idx, CIFAR-10 and the digits, by the pixels that come out; and what it promises."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from dcgan.data import open_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def numbered(n=10, size=32, channels=3):
    """Arrays that are told apart: uint8 (n, size, size, channels), noise."""
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def idx(images):
    return struct.pack(">4I", 0x803, *images.shape[:3]) + images.tobytes()


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def py2_batch(rows):
    """A batch as Python 2 and NumPy 1 wrote the real ones: protocol 2, byte strings, numpy.core.multiarray."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    shape = b"J" + struct.pack("<i", len(rows)) + b"M\0\x0c\x86"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\0K\1\x87R(K\3"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    data = b"T" + struct.pack("<i", rows.size) + rows.tobytes()
    state = b"(K\1" + shape + dtype + b"\x89" + data + b"tb"
    names = b"](" + b"".join(text(b"%d.png" % i) for i in range(len(rows))) + b"e"
    return b"\x80\2}q\1(" + text(b"data") + array + state + text(b"filenames") + names + b"u."


def write_cifar(folder, images, form):
    """Five batches; `form` binary, py2, or the protocol of a pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(np.split(planes(images), 5), 1):
        if form == "binary":
            labels = np.full((len(rows), 1), i, np.uint8)
            (folder / f"data_batch_{i}.bin").write_bytes(np.hstack([labels, rows]).tobytes())
        elif form == "py2":
            (folder / f"data_batch_{i}").write_bytes(py2_batch(rows))
        else:
            rows = np.asfortranarray(rows) if form == 3 else rows
            batch = {"data": rows, "labels": [1] * len(rows), b"batch_label": b"one"}
            (folder / f"data_batch_{i}").write_bytes(pickle.dumps(batch, protocol=form))


@pytest.mark.parametrize("form", ["binary", "py2", 2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, form, packed):
    images = numbered()
    write_cifar(tmp_path / "set", images, form)
    spec = tmp_path / "set"
    if packed:
        spec = tmp_path / "set.tar.gz"
        with tarfile.open(spec, "w:gz") as archive:
            archive.add(tmp_path / "set", "cifar-10-batches-py")
    result = open_images(str(spec), 32)
    np.testing.assert_array_equal(result.images, images)
    assert result.source == str(spec)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images.idx3-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, name, packed):
    images = numbered(size=28, channels=1)
    content = idx(images)
    file = tmp_path / "set" / (name + ".gz" * packed)
    file.parent.mkdir()
    file.write_bytes(gzip.compress(content) if packed else content)
    for spec in (file.parent, file):
        np.testing.assert_array_equal(open_images(str(spec), 28).images, images)
    assert open_images(str(file.parent), 32, 3).images.shape == (10, 32, 32, 3)


def test_idx_prefers_the_training_pictures(tmp_path):
    images = numbered(size=28, channels=1)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images[:3]))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images[3:]))
    np.testing.assert_array_equal(open_images(str(tmp_path), 28).images, images[3:])


ARRAYS = {
    "NHWC": (lambda x: x, 3),
    "NHW": (lambda x: x[..., 0], 1),
    "NHW1": (lambda x: x[..., :1], 1),
    "NCHW": (lambda x: x.transpose(0, 3, 1, 2), 3),
    "N1HW": (lambda x: x[..., :1].transpose(0, 3, 1, 2), 1),
    "column major": (np.asfortranarray, 3),
    "float64 in [0, 1]": (lambda x: x / 255, 3),
    "float16 in [0, 1]": (lambda x: (x / 255).astype(np.float16), 3),
}


@pytest.mark.parametrize("layout", ARRAYS)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_arrays(tmp_path, layout, ending):
    images = numbered()
    change, channels = ARRAYS[layout]
    path = tmp_path / f"set.{ending}"
    if ending == "npy":
        np.save(path, change(images))
    else:
        np.savez_compressed(path, labels=np.zeros(10, np.int64), images=change(images))
    np.testing.assert_array_equal(open_images(str(path), 32).images, images[..., :channels])


def test_npz_without_images_takes_the_only_array_that_can_be_meant(tmp_path):
    np.savez(tmp_path / "set.npz", y=np.zeros(10, np.uint8), x=numbered())
    np.testing.assert_array_equal(open_images(str(tmp_path / "set.npz"), 32).images, numbered())


@pytest.mark.parametrize("size", [16, 28, 32, 64])
def test_digits(size):
    result = open_images("digits", size)
    assert result.images.shape == (1797, size, size, 1) and result.source == result.name == "digits"
    assert result.images.max() == 255 and np.median(result.images) == 0
    assert not result.images[:, [0, -1]].any(), "strokes end inside the frame"
    assert open_images("digits", size, 3).images.shape == (1797, size, size, 3)


@pytest.mark.parametrize("spec", ["digits", "files"])
def test_what_is_promised_of_the_array(tmp_path, spec):
    if spec == "files":
        save(tmp_path / "set" / "a.png", Image.new("RGB", (16, 16)))
        spec = str(tmp_path / "set")
    result = open_images(spec, 16)
    assert result.images.dtype == np.uint8 and result.images.flags.c_contiguous and not result.images.flags.writeable
    assert len(result.fingerprint) == 64
    others = [open_images(spec, 32), open_images(spec, 16, 4)]
    assert len({result.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert open_images(spec, 16).fingerprint == result.fingerprint


def test_importing_it_does_not_import_torch():
    code = "import sys, dcgan.data; sys.exit('torch' in sys.modules or 'pooch' in sys.modules)"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_progress_is_a_line_in_a_log_and_nothing_when_not_wanted(tmp_path, capfd):
    save(tmp_path / "set" / "a.png", Image.new("RGB", (16, 16)))
    open_images(str(tmp_path / "set"), 16, progress=False)
    assert capfd.readouterr().err == ""
    open_images(str(tmp_path / "set"), 32)
    assert "decoding set at 32×32: 1 pictures" in capfd.readouterr().err


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    save(tmp_path / "set" / "a.png", Image.new("RGB", (16, 16)))
    monkeypatch.setattr(sys, "stderr", Terminal())
    open_images(str(tmp_path / "set"), 16)
    assert "100%" in sys.stderr.getvalue()
