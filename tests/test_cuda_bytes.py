"""Bytes that the extension's kernels load and store, counted, against the floor of bench.roofline: on paper, equal.

g++'s -fsanitize=thread puts a call before every access to memory. Linked with counters in place of its own runtime,
that counts what the threads of a kernel load from and store to each tensor. What a GPU's caches save is not in it: a
map (images × pixels × channels) must move once, weights and per-channel numbers may be read again, out of L1 and L2.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from cuda_host import CSRC, FLAGS, call, finish, load, on_host, source_of

from bench.roofline import ADAM_BYTES, HALF, moved_bytes
from dcgan.arch import PRESETS
from kernels._cuda import batch_norm, conv, image
from kernels._cuda import launch as launch_module
from kernels._cuda.adam import adam, adam_table
from kernels._cuda.head import head, head_grad
from kernels.geometry import Epilogue, Partials

BF16 = torch.bfloat16
ARCH = PRESETS["dcgan64"].arch

COUNTERS = """
#include <cstddef>
#include <cstdint>
static struct { uintptr_t begin, end; uint64_t moved[2]; } tensors[64];
static int count;
static void see(void* at, size_t bytes, int written) {
  for (int i = 0; i < count; ++i)
    if (uintptr_t(at) - tensors[i].begin < tensors[i].end - tensors[i].begin) tensors[i].moved[written] += bytes;
}
#define SIZE(n) \\
  void __tsan_read##n(void* at) { see(at, n, 0); } \\
  void __tsan_write##n(void* at) { see(at, n, 1); } \\
  void __tsan_unaligned_read##n(void* at) { see(at, n, 0); } \\
  void __tsan_unaligned_write##n(void* at) { see(at, n, 1); }
extern "C" {
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
void __tsan_read_range(void* at, size_t bytes) { see(at, bytes, 0); }
void __tsan_write_range(void* at, size_t bytes) { see(at, bytes, 1); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void forget() { count = 0; }
void watch(uintptr_t begin, uint64_t bytes) { tensors[count++] = {begin, begin + bytes, {0, 0}}; }
uint64_t moved(int tensor, int written) { return tensors[tensor].moved[written]; }
}
"""


@functools.cache
def counting(source):
    """One source of csrc on a CPU, whose accesses are counted."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    flags = [flag for flag in FLAGS if flag != "-shared"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "counters.cpp").write_text(COUNTERS)
        objects = [folder / "kernels.o", folder / "counters.o"]
        commands = (
            ["g++", *flags, "-fsanitize=thread", "-fno-threadsafe-statics", "-c", "-x", "c++", str(source)],
            ["g++", *flags, "-c", str(folder / "counters.cpp")],
        )
        for out, command in zip(objects, commands, strict=True):
            finish(subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True))
        link = ["g++", "-shared", "-Wl,-z,defs", *map(str, objects), "-o", str(folder / "counting.so")]
        finish(subprocess.Popen(link, stderr=subprocess.PIPE, text=True))
        library = load(folder / "counting.so")
    library.moved.restype = ctypes.c_uint64
    library.watch.argtypes = [ctypes.c_uint64] * 2
    return library


def names_of(op):
    """Names of a launch function's arguments, without the stream."""
    text = "".join(path.read_text() for path in sorted(CSRC.glob("*.h")))
    arguments = re.search(rf"^cudaError_t {op}\(([^)]*)\);", text, re.M)[1]
    return [argument.split()[-1].lstrip("*") for argument in arguments.split(",")][1:]


@pytest.fixture
def traffic(monkeypatch):
    """traffic(run, **more) → {op: {tensor: (bytes read, bytes written)}} of the launches that `run` makes.

    `more` are tensors that an op finds by other ways than its arguments.
    """

    def measure(run, **more):
        found = {}

        def count(op, *arguments):
            library = counting(source_of(op))
            tensors = {n: a for n, a in zip(names_of(op), arguments, strict=True) if isinstance(a, torch.Tensor)} | more
            library.forget()
            for tensor in tensors.values():
                library.watch(tensor.data_ptr(), tensor.nbytes)
            call(op, *arguments, source=library)
            found[op] = {name: tuple(library.moved(i, w) for w in (0, 1)) for i, name in enumerate(tensors)}

        monkeypatch.setattr(launch_module, "launch", count)
        run()
        return found

    with on_host():
        yield measure


def noise(*shape, dtype=BF16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def once(tensor):
    return tensor.nbytes, 0


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
    """Bound by arithmetic: a tile reads x again for each tap, out of L2; all that leaves is y and the statistics.

    Of sm_80's: what TMA loads in the other source passes no instruction that could be counted.
    """
    monkeypatch.setattr(conv, "source", lambda tensor: "sm80")
    size = 8 if kind == "conv" else 4
    x, weight = noise(2, size, size, 64), noise(64, 4, 4, 64) / 32
    made = []
    moved = traffic(lambda: made.extend(getattr(conv, kind)(x, weight, Epilogue(statistics=True))))[f"{kind}_sm80"]
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
