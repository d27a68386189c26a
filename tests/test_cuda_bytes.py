"""Bytes that the extension's kernels load and store, counted, against the floor of bench.roofline: on paper, equal.

What a GPU's caches save is not in it: a map (images × pixels × channels) must move once, weights and per-channel
numbers may be read again, out of L1 and L2.
"""

import re

import pytest
import torch
from cuda_host import CSRC
from cuda_traffic import BF16, counted, noise, once

from bench.roofline import ADAM_BYTES, HALF, moved_bytes
from dcgan.arch import PRESETS
from kernels._cuda import batch_norm, conv, image
from kernels._cuda.adam import adam, adam_table
from kernels._cuda.head import head, head_grad
from kernels.geometry import Epilogue, Partials

ARCH = PRESETS["dcgan64"].arch


@pytest.fixture
def traffic(monkeypatch):
    yield from counted(monkeypatch)


def test_batch_norm(traffic):
    y, da = noise(4, 16, 16, 72) + 1, noise(4, 16, 16, 72, seed=1)
    state, means, read, written = noise(4, 2, 72, dtype=torch.float32), torch.zeros(2, 2, 72), once(y), (0, y.nbytes)
    moved = traffic(lambda: batch_norm.statistics(y, 2))["bn_statistics"]
    assert moved["y"] == read
    moved = traffic(lambda: batch_norm.apply(y, state, "relu"))["bn_apply"]
    assert moved["y"] == read and moved["out"] == written
    moved = traffic(lambda: batch_norm.activation_grad(da, y, state, "relu"))["bn_activation_grad"]
    assert moved["y"] == read and moved["da"] == read and moved["g"] == written
    moved = traffic(lambda: batch_norm.apply_grad(da, y, state, means))["bn_apply_grad"]
    assert moved["y"] == read and moved["g"] == read and moved["dy"] == written


def test_merging_reads_the_tiles_once(traffic):
    values, counts, ones = noise(2, 2, 40, 72, dtype=torch.float32).abs(), torch.full((2, 40), 9.0), torch.ones(72)
    moved = traffic(lambda: batch_norm.merge_statistics(Partials(values, counts), ones, ones))["bn_merge_statistics"]
    assert moved["values"] == once(values) and moved["state"] == (0, 4 * 2 * 72 * 4)
    moved = traffic(lambda: batch_norm.merge_sums(Partials(values, None), 9))["bn_merge_sums"]
    assert moved["values"] == once(values)


@pytest.mark.parametrize("elements", [5000, 4096])
def test_adam(traffic, elements):
    names = ("p", "g", "m", "v")
    tensors = {name: noise(elements, dtype=torch.float32, seed=i).abs() for i, name in enumerate(names)}
    tensors["copy"] = torch.empty(elements, dtype=BF16)
    table = adam_table(*([t] for t in tensors.values()))
    moved = traffic(lambda: adam(table, torch.tensor(0), 1e-3), **tensors)["adam"]
    assert sum(sum(moved[name]) for name in tensors) == ADAM_BYTES * elements
    scaled = traffic(lambda: adam(table, torch.tensor(0), 1e-3, loss_scale=torch.ones(3)), **tensors)["adam"]
    assert scaled.pop("g") == (2 * tensors["g"].nbytes, 0)  # looked at before
    assert all(scaled[name] == moved[name] for name in tensors if name != "g")


def test_head(traffic):
    layer = ARCH.discriminator[-1]
    y, weight, state = noise(6, 4, 4, 512), noise(1, 4, 4, 512) / 90, noise(4, 2, 512, dtype=torch.float32)
    floor = HALF * layer.in_elements(6)
    assert traffic(lambda: head(y, weight, state, (True, False)))["head"]["y"] == (floor, 0)
    moved = traffic(lambda: head_grad(y, weight, state, torch.ones(6)))["head_grad"]
    assert moved["y"] == (floor, 0) and moved["g"] == (0, floor) and moved["dw"] == (0, 4 * 8192)


def map_bytes(moved, *small):
    """Bytes of an image's kernel: of maps all that is moved, of `small` tensors their size, which caches hold."""
    assert all(t.nbytes <= sum(moved[name]) for name, t in small), moved
    names = [name for name in ("x", "y", "saved", "low", "high") if name in moved]
    return sum(sum(moved[name]) for name in names) + sum(t.nbytes for _, t in small)


# The maps of a box have a rim, pixels that boxes on both sides read. The second time they come out of L2; here they
# count. 32×32 low pixels are four boxes of 8 rows: of an image 18 rows each and not 16, less one at either end; of a
# map 10 rows and not 8. A row of 198 elements that starts anywhere is up to two vectors of eight more.
IMAGE_RIM, MAP_RIM = 70 / 64, 38 / 32


def test_first_layer_of_d(traffic):
    layer, images = ARCH.discriminator[0], 2
    x, weight = noise(images, 64, 64, 3), noise(64, 4, 4, 3)
    moved = traffic(lambda: image.conv(x, weight, Epilogue("leaky_relu")))["image_conv"]
    assert moved["y"] == (0, 2 * layer.out_elements(images))
    assert 1 <= moved["x"][0] / x.nbytes <= IMAGE_RIM + 0.05
    floor = moved_bytes(layer, "forward", images)
    assert floor <= map_bytes(moved, ("w", weight)) <= 1.02 * floor

    dy, kept = noise(images, 32, 32, 64), noise(images, 64, 64, 3)
    moved = traffic(lambda: image.conv_transpose(dy, weight, Epilogue("tanh", saved=kept)))["image_conv_transpose"]
    assert moved["saved"] == once(kept) and moved["y"] == (0, kept.nbytes)
    assert moved["x"][0] == MAP_RIM * dy.nbytes
    floor = moved_bytes(layer, "dgrad", images)
    assert map_bytes(moved, ("w", weight)) == floor + (MAP_RIM - 1) * dy.nbytes


def test_last_layer_of_g(traffic):
    layer, images = ARCH.generator[-1], 2
    x, weight = noise(images, 32, 32, 64), noise(64, 4, 4, 3)
    moved = traffic(lambda: image.conv_transpose(x, weight, Epilogue("tanh")))["image_conv_transpose"]
    assert moved["x"][0] == MAP_RIM * x.nbytes and moved["y"] == (0, 2 * layer.out_elements(images))
    assert map_bytes(moved, ("w", weight)) == moved_bytes(layer, "forward", images) + (MAP_RIM - 1) * x.nbytes

    dy, state = noise(images, 64, 64, 3), noise(4, 1, 64, dtype=torch.float32)
    epilogue = Epilogue("relu", saved=x, state=state)
    moved = traffic(lambda: image.conv(dy, weight, epilogue))["image_conv"]
    assert moved["saved"] == once(x) and moved["y"] == (0, x.nbytes)
    floor = moved_bytes(layer, "dgrad", images)
    assert floor <= map_bytes(moved, ("w", weight)) <= 1.02 * floor


def test_weight_gradient_of_an_image(traffic):
    layer, images = ARCH.discriminator[0], 2
    low, high = noise(images, 32, 32, 64), noise(images, 64, 64, 3)
    moved = traffic(lambda: image.wgrad(low, high))
    product, added = moved["image_wgrad"], moved["sum_shares"]
    assert product["low"] == once(low) and added["gradient"] == (0, 4 * layer.weights)
    assert product["shares"] == added["shares"][::-1]  # each written once and read once, out of L2
    floor = moved_bytes(layer, "wgrad", images)
    assert floor <= map_bytes(product) + added["gradient"][1] <= 1.02 * floor


@pytest.mark.parametrize("kind, most", [("conv", 4), ("conv_transpose", 16)])
def test_products_store_their_output_once(traffic, monkeypatch, kind, most):
    """A tile of sm_80's reads x again for each tap, out of L2; all that leaves is y and its sums."""
    monkeypatch.setattr(conv, "source", lambda tensor: "sm80")
    size = 8 if kind == "conv" else 4
    x, weight = noise(2, size, size, 64), noise(64, 4, 4, 64) / 32
    made = []
    moved = traffic(lambda: made.extend(getattr(conv, kind)(x, weight, Epilogue(statistics=True))))["conv_sm80"]
    assert moved["y"] == (0, made[0].nbytes) and moved["values"] == (0, made[1].values.nbytes)
    assert x.nbytes < moved["x"][0] < most * x.nbytes and moved["w"][0] == weight.nbytes


@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.name)
def test_every_kernel_opens_with_its_plan(source):
    """Its maths, then tile, bytes, what accumulates or computes, and what it beats."""
    openings = re.split(r"^(?:template <.*>\n)?__global__ ", source.read_text(), flags=re.M)[:-1]
    assert openings
    for text in openings:
        opening = re.search(r"(?:^//.*\n)+\Z", text, re.M)
        for start in ("Tile: ", "Bytes: ", "(Accumulates|Computes|Compares) ", "Beats "):
            assert opening and re.search(rf"^// {start}", opening[0], re.M), (start, text[-400:])
