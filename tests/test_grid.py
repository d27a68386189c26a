"""Pictures for people: exact pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dcgan.errors import InputError
from dcgan.grid import grid, save_grid, save_png, to_uint8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_level_survives_the_way_to_the_model_and_back(dtype):
    levels = torch.arange(256, dtype=torch.float64).reshape(1, 1, 16, 16)
    images = (levels / 127.5 - 1).to(dtype)
    assert np.array_equal(to_uint8(images), levels.to(torch.uint8).numpy().reshape(1, 16, 16, 1))


def test_values_are_rounded_and_clamped_and_what_is_not_finite_is_grey():
    values = [-1.0, -0.9961, -0.9960, 0.0, 0.99, 1.0, 1.5, -7.0, 3e38, float("nan"), float("inf"), -float("inf")]
    pixels = to_uint8(torch.tensor(values).reshape(1, 1, 1, -1)).ravel().tolist()
    assert pixels == [0, 0, 1, 128, 254, 255, 255, 0, 255, 128, 128, 128]


def test_any_layout_and_a_gradient_give_the_same_bytes():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = to_uint8(images)
    assert expected.shape == (2, 4, 5, 3) and expected.flags.c_contiguous
    padded = torch.full((2, 3, 8, 5), float("nan"))
    padded[:, :, ::2] = images
    for other in (images.to(memory_format=torch.channels_last), padded[:, :, ::2], images.requires_grad_()):
        assert np.array_equal(to_uint8(other), expected)


def test_the_images_are_not_changed():
    images = torch.full((1, 1, 2, 2), 0.3)
    to_uint8(images)
    assert (images == 0.3).all()


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_other_tensors_are_refused_by_name(images):
    with pytest.raises(ValueError, match=r"images is torch\..*accepted is a floating-point tensor"):
        to_uint8(images)


def test_grid_places_images_row_by_row_with_black_between():
    images = np.array([1, 2, 3], np.uint8).reshape(3, 1, 1, 1).repeat(2, axis=2)
    sheet = grid(images, columns=2, padding=1)
    assert sheet[:, :, 0].tolist() == [[1, 1, 0, 2, 2], [0, 0, 0, 0, 0], [3, 3, 0, 0, 0]]
    assert grid(images, columns=9, padding=0)[:, :, 0].tolist() == [[1, 1, 2, 2, 3, 3]]  # no empty columns


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (12, 3, 4), (64, 8, 8)])
def test_grid_is_near_square_by_default(n, rows, columns):
    assert grid(np.zeros((n, 4, 6, 3), np.uint8)).shape == (rows * 6 - 2, columns * 8 - 2, 3)


@pytest.mark.parametrize("arguments", [{"columns": 0}, {"padding": -1}])
def test_grid_refuses_what_makes_no_grid(arguments):
    with pytest.raises(ValueError, match="accepted"):
        grid(np.zeros((4, 2, 2, 1), np.uint8), **arguments)
    with pytest.raises(ValueError, match="at least one image"):
        grid(np.zeros((0, 2, 2, 1), np.uint8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_png_reads_back_as_it_was(tmp_path, channels, mode):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    path = save_png(tmp_path / "new" / "grid.PNG", array)
    with Image.open(path) as image:
        assert (image.mode, image.size, image.format) == (mode, (7, 5), "PNG")
        assert np.array_equal(np.asarray(image).reshape(array.shape), array)


def test_save_grid_takes_tensors_and_bytes(tmp_path):
    images = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    a = save_grid(tmp_path / "a.png", images, columns=1, padding=0)
    b = save_grid(tmp_path / "b.png", to_uint8(images), columns=1, padding=0)
    assert a.read_bytes() == b.read_bytes()
    with Image.open(a) as image:
        assert np.array_equal(np.asarray(image), to_uint8(images).reshape(8, 4))


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = save_png(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    before = path.read_bytes()

    def fail(self, target, format):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_png(path, np.ones((2, 2), np.uint8))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2), np.float32), np.zeros((0, 2, 3), np.uint8)]
)
def test_save_png_refuses_what_is_no_picture(tmp_path, array):
    with pytest.raises(ValueError, match=r"array is .*accepted"):
        save_png(tmp_path / "a.png", array)
    assert not list(tmp_path.iterdir())


def test_save_png_refuses_another_format(tmp_path):
    with pytest.raises(InputError, match=r"grid\.jpg.*ends in \.png"):
        save_png(tmp_path / "grid.jpg", np.zeros((2, 2), np.uint8))
