"""The order of the data and the noise depend on the seed alone."""

import numpy as np
import pytest
import torch

from dcgan.batches import Batches, Noise


def pictures(n=10, size=4, channels=3):
    """Distinct pictures whose first pixel is their number."""
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return images


def numbers(batch):
    return ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_an_epoch_has_every_picture_once_and_ends_in_a_smaller_batch():
    batches = Batches(pictures(10), 4, seed=0)
    epoch = [numbers(batches(step)) for step in range(3)]
    assert [len(batch) for batch in epoch] == [4, 4, 2]
    assert sorted(sum(epoch, [])) == list(range(10))
    assert sum((numbers(batches(step)) for step in range(3, 6)), []) != sum(epoch, [])


def test_any_step_can_be_asked_for_directly():
    one, other = Batches(pictures(), 4, seed=3, flip=True), Batches(pictures(), 4, seed=3, flip=True)
    in_order = [one(step) for step in range(9)]
    for step in (8, 2, 5):
        assert torch.equal(other(step), in_order[step])


@pytest.mark.parametrize("change", [{"seed": 1}, {"course": 1}])
def test_another_seed_and_another_course_give_another_order(change):
    course = change.pop("course", 0)
    base = numbers(Batches(pictures(100), 100, seed=0)(0))
    assert numbers(Batches(pictures(100), 100, **{"seed": 0, **change})(0, course)) != base


def test_values_are_scaled_to_plus_minus_one():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    images[1] = 255
    batch = Batches(images, 2, seed=0)(0)
    assert batch.dtype == torch.float32 and batch.shape == (2, 1, 4, 4)
    assert sorted(batch[:, 0, 0, 0].tolist()) == [-1.0, 1.0]


def test_flip_mirrors_about_half_and_nothing_else():
    images = pictures(200)
    plain, flipped = Batches(images, 200, seed=0)(0), Batches(images, 200, seed=0, flip=True)(0)
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(3) == flipped).flatten(1).all(1)
    assert (same ^ mirrored).all() and 60 < mirrored.sum() < 140


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_memory_map_gives_the_same_batches_as_resident_data(tmp_path, monkeypatch, channels_last):
    np.save(tmp_path / "images.npy", pictures())
    resident = Batches(pictures(), 4, seed=0, channels_last=channels_last)
    monkeypatch.setattr("dcgan.batches.RESIDENT_FRACTION", 0.0)
    mapped = Batches(np.load(tmp_path / "images.npy", mmap_mode="r"), 4, seed=0, channels_last=channels_last)
    assert resident.resident and not mapped.resident
    for step in range(3):
        batch = mapped(step)
        assert torch.equal(resident(step), batch)
        assert batch.is_contiguous(memory_format=mapped.memory_format)


@pytest.mark.parametrize("flip", [False, True])
def test_streamed_batches_in_any_order_are_the_resident_ones(monkeypatch, flip):
    """In order over epochs with a smaller last batch, after a jump back, and after a rollback's new course."""
    resident = Batches(pictures(), 4, seed=0, flip=flip)
    monkeypatch.setattr("dcgan.batches.RESIDENT_FRACTION", 0.0)
    streamed = Batches(pictures(), 4, seed=0, flip=flip)
    for step, course in [*((step, 0) for step in range(8)), (2, 0), (3, 0), (4, 1), (5, 1), (5, 1), (0, 0)]:
        assert torch.equal(streamed(step, course), resident(step, course)), step
    assert streamed.ring.waited_s >= 0 and len(streamed.rows) == 8


def test_a_picture_that_cannot_be_read_is_not_skipped(monkeypatch):
    monkeypatch.setattr("dcgan.batches.RESIDENT_FRACTION", 0.0)
    batches = Batches(pictures(), 4, seed=0)
    batches(0)
    batches.ring.slots[1].filling.result()
    monkeypatch.setattr("numpy.take", lambda *a, **k: (_ for _ in ()).throw(OSError("input/output error")))
    batches(1)  # was there already
    with pytest.raises(OSError, match="input/output error"):
        batches(2)


def test_a_batch_goes_where_it_is_wanted_in_its_type():
    room = torch.full((4, 4, 4, 3), float("nan"), dtype=torch.bfloat16).permute(0, 3, 1, 2)
    batches, same = (Batches(pictures(), 4, seed=0) for _ in range(2))
    got = batches.take(batches.seek(0), out=room)
    assert got.data_ptr() == room.data_ptr() and torch.equal(room, same(0).bfloat16())


def test_noise_is_a_stream_that_can_be_put_back():
    noise = Noise(5, seed=0, device="cpu")
    state = noise.generator.get_state()
    first = noise(3)
    assert first.shape == (3, 5) and not torch.equal(first, noise(3))
    noise.generator.set_state(state)
    assert torch.equal(noise(3), first)
    assert torch.equal(noise.fixed(4), Noise(5, seed=0, device="cpu").fixed(4))
    noise.restart(0, 1)
    assert not torch.equal(noise(3), first)
