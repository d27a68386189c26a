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
from kernels._triton.config import WgradConfig, pixel_box  # noqa: E402
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
    check_wgrad(3, 5, 4, 24, 24, config, before=before, side=side, groups=2)


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


def test_many_shares_are_summed_by_a_launch_of_their_own(monkeypatch):
    monkeypatch.setattr(wgrad, "SETTLED_BYTES", 0)
    config = WgradConfig(1, 4, 4, 16, 16, 18, 4, 2, True)
    assert len(prepare_wgrad(torch.zeros(9, 8, 8, 16), torch.zeros(9, 16, 16, 16), config=config).launches) == 2
    check_wgrad(9, 8, 8, 16, 16, config)


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
        (lambda: prepare_wgrad(Deferred(LOW, STATE), Deferred(HIGH, STATE)), "both deferred"),
        (lambda: prepare_wgrad(Deferred(LOW, STATE[:, :, :8]), HIGH), "low.state has shape"),
        (lambda: prepare_wgrad(Deferred(LOW, torch.zeros(4, 3, 24)), HIGH), "3 groups: they must divide"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(
    images=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9), low=st.integers(1, 40),
    high=st.integers(1, 40), pixels=st.sampled_from([16, 32, 64]), columns=st.sampled_from([16, 32]),
    split=st.integers(1, 4), tma=st.booleans(), groups=st.integers(1, 2), side=st.sampled_from(["low", "high"]),
    before=st.sampled_from([None, "none", "relu", "leaky_relu"]), seed=st.integers(0, 999),
)  # fmt: skip
def any_wgrad(images, height, width, low, high, pixels, columns, split, tma, groups, side, before, seed):
    if tma:
        low, high = -(-low // 4) * 4, -(-high // 4) * 4
    config = WgradConfig(*pixel_box(pixels, height, width), 16, columns, split, 4, 2, tma)
    options = {} if before is None else {"before": before, "side": side, "groups": groups}
    check_wgrad(images, height, width, low, high, config, seed=seed, **options)


def test_generated():
    generated(any_wgrad, 5)


@pytest.mark.long
def test_generated_long():
    generated(any_wgrad, 2000)
