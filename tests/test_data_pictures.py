"""Folders and zips of pictures: each kind of picture, by the pixels that come out; and the workers that decode them."""

import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from dcgan.data import decode, open_images, workers

RED, BLUE = (220, 30, 40), (20, 40, 200)


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


def sixteen_bits(value):
    return Image.fromarray(np.full((20, 20), value, np.uint16))


HALF = Image.new("RGBA", (20, 20), (*RED, 0))  # all transparent: white, whatever lies beneath
PICTURES = {  # file name → picture, options of the file, the centre pixel expected with three channels
    "a.png": (Image.new("RGB", (20, 20), RED), {}, RED),
    "a.PNG": (Image.new("RGB", (20, 20), RED), {}, RED),
    "a.jpg": (Image.new("RGB", (20, 20), RED), {"quality": 95}, RED),
    "a.jpeg": (Image.new("L", (20, 20), 77), {}, (77,) * 3),
    "cmyk.jpg": (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), {"quality": 95}, (254, 0, 0)),
    "a.bmp": (Image.new("RGB", (20, 20), RED), {}, RED),
    "one bit.bmp": (Image.new("1", (20, 20), 1), {}, (255,) * 3),
    "a.gif": (Image.new("RGB", (20, 20), RED).quantize(4), {}, RED),
    "a.webp": (Image.new("RGB", (20, 20), RED), {"lossless": True}, RED),
    "a.tiff": (Image.new("RGB", (20, 20), RED), {"compression": "tiff_lzw"}, RED),
    "cmyk.tif": (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), {}, (255, 0, 0)),
    "a.ppm": (Image.new("RGB", (20, 20), RED), {}, RED),
    "palette.png": (Image.new("RGB", (20, 20), BLUE).quantize(2), {}, BLUE),
    "palette and alpha.png": (HALF.quantize(2), {}, (255,) * 3),
    "colour key.png": (Image.new("RGB", (20, 20), RED), {"transparency": RED}, (255,) * 3),
    "rgba.png": (HALF, {}, (255,) * 3),
    "la.png": (Image.new("LA", (20, 20), (10, 255)), {}, (10,) * 3),
    "16 bits.png": (sixteen_bits(0x8000), {}, (128,) * 3),
    "16 bits.tif": (sixteen_bits(0x4000), {}, (64,) * 3),
    "16 bits.pgm": (sixteen_bits(0xFFFF), {}, (255,) * 3),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("size", [20, 8, 40])
def test_a_picture_of_each_kind(tmp_path, name, size):
    image, options, expected = PICTURES[name]
    save(tmp_path / "set" / name, image, **options)
    images = open_images(str(tmp_path / "set"), size, 3).images
    assert images.shape == (1, size, size, 3)
    np.testing.assert_allclose(images[0, size // 2, size // 2].astype(int), expected, atol=3)


@pytest.mark.parametrize(
    "modes, channels", [(["L", "L"], 1), (["L", "RGB"], 3), (["RGBA", "LA"], 4), (["RGBA", "RGB"], 3), (["L", "LA"], 3)]
)
def test_channels_follow_the_data(tmp_path, modes, channels):
    for i, mode in enumerate(modes):
        save(tmp_path / "set" / f"{i}.png", Image.new(mode, (9, 9)))
    assert open_images(str(tmp_path / "set"), 16).images.shape == (2, 16, 16, channels)
    for wanted in (1, 3, 4):
        assert open_images(str(tmp_path / "set"), 16, wanted).images.shape == (2, 16, 16, wanted)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_the_orientation_of_a_camera_is_honoured(tmp_path, ending):
    """Tag 274 = 6: the row that is on top belongs on the right."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[274] = 6
    save(
        tmp_path / "set" / f"a.{ending}",
        Image.fromarray(pixels),
        exif=exif,
        **({"quality": 95} if ending == "jpg" else {}),
    )
    image = open_images(str(tmp_path / "set"), 16, 1).images[0, :, :, 0]
    assert image[:, 13:].min() > 240 and image[:, :11].max() < 15


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (17, 40), (16, 16)])
def test_the_centre_is_kept(tmp_path, shape):
    """White in the middle square, black outside: nothing black is left but what the filter draws in from the edge."""
    height, width = shape
    side = min(shape)
    pixels = np.zeros(shape, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 255
    save(tmp_path / "set" / "a.png", Image.fromarray(pixels))
    assert open_images(str(tmp_path / "set"), 16).images.min() > 245


def test_shrinking_is_antialiased(tmp_path):
    """A fine chessboard becomes grey, in a picture (JPEG: decoded at a quarter of its size) and in an array."""
    board = np.kron(np.indices((128, 128)).sum(0) % 2, np.ones((2, 2))).astype(np.uint8) * 255
    save(tmp_path / "set" / "a.png", Image.fromarray(board))
    save(tmp_path / "jpeg" / "a.jpg", Image.fromarray(board), quality=95)
    np.save(tmp_path / "a.npy", board[None])
    for spec in ("set", "jpeg", "a.npy"):
        image = open_images(str(tmp_path / spec), 16).images
        assert abs(image.astype(int) - 127).max() <= 4, spec


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_the_shortcuts_of_shrinking_cost_no_sharpness(tmp_path, ending):
    """Against the plain filter on all pixels, a mean error of 1 grey level; a step too few would make it 9."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 70), dtype=np.uint8)
    image = Image.fromarray(noise).resize((280, 280), Image.Resampling.BICUBIC)
    save(tmp_path / "set" / f"a.{ending}", image, **({"quality": 98} if ending == "jpg" else {}))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert abs(open_images(str(tmp_path / "set"), 32).images[0, :, :, 0] - expected).mean() < 2


def test_a_zip_and_its_folder_are_the_same_set(tmp_path):
    """Below folders, behind links and a loop of links; hidden files, notes and a Mac's shadow files are no pictures."""
    folder = tmp_path / "set"
    for i, pixels in enumerate(numbered(6)):
        save(folder / f"class {i % 2}" / "é" / f"{i}.png", Image.fromarray(pixels))
    (folder / "loop").symlink_to(folder)
    for name in ("notes.txt", ".hidden.png", "__MACOSX/._0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder))
    unpacked, packed = (open_images(str(spec), 32) for spec in (folder, tmp_path / "set.zip"))
    np.testing.assert_array_equal(unpacked.images, numbered(6)[[0, 2, 4, 1, 3, 5]])
    assert unpacked.fingerprint == packed.fingerprint
    assert (unpacked.name, packed.name, unpacked.skipped) == ("set", "set.zip", ())


def test_workers_do_what_one_process_does(tmp_path, monkeypatch):
    """Two workers and none; one picture in the middle kills the process that decodes it."""
    images = numbered(150, 16)
    for i, pixels in enumerate(images):
        save(tmp_path / "set" / f"{i:03}.png", Image.fromarray(pixels))
    alone = open_images(str(tmp_path / "set"), 16)
    entries = [str(path) for path in sorted((tmp_path / "set").iterdir())]
    killer = tmp_path / "decode.py"
    with open(decode.__file__) as file:
        killer.write_text(
            file.read()
            .replace("def decode_all(", "def decode_all_(")
            .replace(
                "def serve(",
                "def decode_all(reader, entries, *rest):\n"
                "    if any('070' in entry for entry in entries):\n        os._exit(1)\n"
                "    return decode_all_(reader, entries, *rest)\n\n\ndef serve(",
            )
        )
    monkeypatch.setattr(workers, "SERIAL", 0)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    together = b"".join(pixels for _, pixels in workers.decode_in_order(entries, None, 16, 3))
    np.testing.assert_array_equal(alone.images, images)
    assert together == images.tobytes()

    monkeypatch.setattr(workers.decode, "__file__", str(killer))
    results = list(workers.decode_in_order(entries, None, 16, 3))
    reasons = [reason for batch, _ in results for reason in batch]
    assert [i for i, reason in enumerate(reasons) if reason] == [70] and "crashed" in reasons[70]
    assert b"".join(pixels for _, pixels in results) == np.delete(images, 70, 0).tobytes()


def test_workers_that_do_not_start_are_done_without(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers, "SERIAL", 0)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    for i in range(40):
        save(tmp_path / "set" / f"{i}.png", Image.new("L", (8, 8), i))
    assert open_images(str(tmp_path / "set"), 8).images.shape == (40, 8, 8, 1)
