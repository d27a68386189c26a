"""The weight gradient against its twin: every geometry of the family, both load paths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import (
    BOTH_PATHS,
    EVERY_GEOMETRY,
    assert_accurate,
    fenced,
    generated,
    only_interpreted,
    run_guarded,
    tensor,
)

from kernels import reference
from kernels.geometry import Deferred

only_interpreted()

from kernels._triton import wgrad  # noqa: E402
from kernels._triton.config import FLAT_CHANNELS, WgradConfig, pixel_box  # noqa: E402
from kernels._triton.wgrad import prepare_wgrad  # noqa: E402


def check_wgrad(
    images, height, width, low, high, config=None, dtype=torch.float32, seed=0, before=None, side="low", groups=1
):
    """before: the activation that the batch norm of `side`, in `groups`, is deferred with; None for none."""
    generator = torch.Generator().manual_seed(seed)
    images *= groups
    maps = {
        "low": tensor(generator, images, height, width, low, dtype=dtype),
        "high": tensor(generator, images, 2 * height, 2 * width, high, dtype=dtype),
    }
    kept = list(maps.values())
    if before is not None:
        y = maps[side]
        norm = tensor(generator, y.shape[3]), tensor(generator, y.shape[3]) + 2
        state = fenced(reference.merge_statistics(reference.statistics(y, groups), *norm))
        maps[side] = Deferred(y, state, before)
        kept.append(state)
    ours = run_guarded(prepare_wgrad(**maps, config=config), *kept)
    exact = [reference.settled(x).double() for x in maps.values()]
    strays = reference.wgrad(*(x.square() for x in exact)).sqrt()
    twin, oracle = reference.wgrad(**maps), reference.wgrad(*exact)
    assert_accurate(ours, twin, oracle, "wgrad", terms=images * height * width, addends=[strays])


@pytest.mark.parametrize("size, tma", EVERY_GEOMETRY)
def test_every_geometry(size, tma):
    pixels = 32 if size <= 16 else 1024
    check_wgrad(1, size, size, 16, 16, WgradConfig(*pixel_box(pixels, size, size), 16, 16, 2, 4, 2, tma))


@BOTH_PATHS
@pytest.mark.parametrize(
    "images, height, width, low, high, rows, columns, split",
    [
        pytest.param(1, 4, 4, 16, 16, 16, 16, 1, id="batch 1, one share"),
        pytest.param(3, 4, 4, 24, 24, 32, 32, 2, id="odd batch, channels no multiple of the tile"),
        pytest.param(2, 7, 7, 16, 16, 16, 16, 3, id="7×7"),
        pytest.param(2, 3, 5, 16, 16, 16, 16, 2, id="height and width apart"),
        pytest.param(1, 4, 4, 16, 16, 16, 16, 4, id="more shares than boxes"),
    ],
)
def test_edges(images, height, width, low, high, rows, columns, split, tma):
    config = WgradConfig(*pixel_box(16, height, width), rows, columns, split, 4, 2, tma)
    check_wgrad(images, height, width, low, high, config)


@BOTH_PATHS
def test_in_half_precision(tma):
    check_wgrad(2, 4, 4, 16, 16, WgradConfig(1, 4, 4, 16, 16, 2, 4, 2, tma), torch.float16)


@BOTH_PATHS
@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("before", ["none", "relu", "leaky_relu"])
def test_batch_norm_in_the_load(before, side, tma):
    """Two groups of three images by boxes of two, which must not mix them; padding of the high side."""
    config = WgradConfig(2, 4, 4, 16, 16, 2, 4, 2, tma)
    check_wgrad(3, 5, 4, 16, 16, config, before=before, side=side, groups=2)


@pytest.mark.parametrize("side", ["low", "high"])
def test_batch_norm_in_the_load_beside_an_image(side):
    check_wgrad(3, 4, 4, 16, 3, before="relu", side=side, groups=2)


@pytest.mark.parametrize("low, high", [(16, 3), (17, 20), (1, 1)])
def test_channels_that_tma_cannot_load(low, high):
    check_wgrad(2, 4, 4, low, high)


def test_deterministic():
    generator = torch.Generator().manual_seed(0)
    low, high = tensor(generator, 4, 4, 4, 16), tensor(generator, 4, 8, 8, 16)
    config = WgradConfig(1, 4, 4, 16, 16, 3, 4, 2, True)
    assert torch.equal(*(prepare_wgrad(low, high, config=config).run() for _ in range(2)))


@BOTH_PATHS
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("before, side", [(None, "low"), ("relu", "low"), ("leaky_relu", "high")])
def test_taps_side_by_side(taps, before, side, tma):
    """A low box serves several taps of a row; the first and the last reach over either edge of the picture."""
    config = WgradConfig(1, 4, 4, 16, 16, 2, 4, 2, tma, taps)
    check_wgrad(2, 5, 4, 16, 24, config, before=before, side=side)


def test_pending_gradients_are_summed_together():
    """Five of them: a launch for four, and another; each of a size, and a number of shares, of its own."""
    generator, pending, wanted = torch.Generator().manual_seed(0), [], []
    for high, split in ((3, 2), (16, 3), (20, 1), (16, 17), (7, 2), (16, 4)):
        low, high = tensor(generator, 2, 4, 4, 16), tensor(generator, 2, 8, 8, high)
        out = fenced(torch.full((16, 4, 4, high.shape[3]), float("nan")))
        config = WgradConfig(1, 2, 2, 16, 16, split, 4, 2, False)
        wgrad.prepare_wgrad(low, high, config=config, out=out, pending=pending).run()
        wanted.append((out, reference.wgrad(low.double(), high.double())))
    assert [len(values) for values, _ in pending] == [2, 3, 17, 2, 4]
    job = wgrad.prepare_sum_shares(pending)
    assert len(job.launches) == 2
    run_guarded(job, *(t for shares in pending for t in shares))
    for out, exact in wanted:
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)
    wgrad.sum_shares([])  # nothing to do


LOW, HIGH = torch.zeros(2, 4, 4, 24), torch.zeros(2, 8, 8, 16)
STATE = torch.zeros(4, 1, 24)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: prepare_wgrad(LOW, HIGH[:, :6]), "high has shape"),
        (lambda: prepare_wgrad(LOW, HIGH.half()), "high is torch.float16: expected torch.float32"),
        (lambda: prepare_wgrad(LOW, HIGH, precision="tf16"), "precision is 'tf16'"),
        (
            lambda: prepare_wgrad(LOW, torch.zeros(2, 8, 8, 3), config=WgradConfig(1, 4, 4, 16, 16, 1, 4, 2, True)),
            "of 16",
        ),
        (
            lambda: prepare_wgrad(LOW, HIGH, config=WgradConfig(1, 4, 4, 16, 16, 1, 4, 2, True, 3)),
            "taps must be 1, or 2",
        ),
        (
            lambda: prepare_wgrad(LOW, HIGH[..., :3].clone(), config=WgradConfig(1, 4, 4, 16, 16, 1, 4, 2, False, 2)),
            "taps must be 1,",
        ),
        (lambda: prepare_wgrad(Deferred(LOW, STATE), Deferred(HIGH, STATE)), "both deferred"),
        (lambda: prepare_wgrad(Deferred(LOW, STATE[:, :, :8]), HIGH), "low.state has shape"),
        (lambda: prepare_wgrad(Deferred(LOW, torch.zeros(4, 3, 24)), HIGH), "3 groups: they must divide"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(
    images=st.integers(1, 3), height=st.integers(1, 7), width=st.integers(1, 7), low=st.integers(1, 24),
    high=st.integers(1, 24), pixels=st.sampled_from([16, 32, 64]), columns=st.sampled_from([16, 32]),
    split=st.integers(1, 4), taps=st.sampled_from([1, 2, 4]), tma=st.booleans(), groups=st.integers(1, 2),
    side=st.sampled_from(["low", "high"]),
    before=st.sampled_from([None, "none", "relu", "leaky_relu"]), seed=st.integers(0, 999),
)  # fmt: skip
def any_wgrad(images, height, width, low, high, pixels, columns, split, taps, tma, groups, side, before, seed):
    if tma:
        low, high = -(-low // 4) * 4, -(-high // 4) * 4
    taps = 1 if high < FLAT_CHANNELS and not tma else taps
    config = WgradConfig(*pixel_box(pixels, height, width), 16, columns, split, 4, 2, tma, taps)
    options = {} if before is None else {"before": before, "side": side, "groups": groups}
    check_wgrad(images, height, width, low, high, config, seed=seed, **options)


def test_generated():
    generated(any_wgrad, 5)


@pytest.mark.long
def test_generated_long():
    generated(any_wgrad, 2000)
