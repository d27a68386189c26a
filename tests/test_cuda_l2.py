"""What the tensor-core products of sm_90 load, counted: each pixel once for four taps, weights once a cluster.

By the sums of docs/cuda_convolution.md L2 is what bounds such products otherwise; this holds the sums to the sources.
"""

import pytest
from cuda_host import CSRC
from cuda_traffic import counted, noise

from bench.roofline import HALF
from dcgan.arch import PRESETS
from kernels._cuda import conv
from kernels.geometry import CudaConfig, Epilogue

ARCH = PRESETS["dcgan64"].arch


@pytest.fixture
def traffic(monkeypatch):
    yield from counted(monkeypatch)


def seen(size, box, starts):
    """Of rows 0 to size − 1 those that boxes of `box` and one more load, from each of `starts` beside the box's own."""
    return sum(
        max(0, min(at + start + box + 1, size) - max(at + start, 0)) for at in range(0, size, box) for start in starts
    )


def from_l2(kernel, images, groups, size, into, out, config):
    """(bytes of the pixels, bytes of the other operand) that a launch on sm_90 loads, from L2 or beyond.

    `size` is of the low side; a weight gradient's channels are low and high, and its other operand is low.
    """
    pixels = conv.BOX_PIXELS if kernel == "wgrad" else conv.TILE_PIXELS
    height, width = conv.box(size, size, pixels)
    deep, per_group = pixels // (height * width), images // groups
    covered = sum(min(deep, images - g * per_group - n) for g in range(groups) for n in range(0, per_group, deep))
    starts = (0, -1)  # of the planes of a convolution, and of the phases of a transposed one
    plane = covered * seen(size, height, starts) * seen(size, width, starts)
    tiles = groups * conv.boxes(per_group, size, size, pixels)
    wide = -(-(into if kernel == "wgrad" else out) // config.columns)
    if kernel == "wgrad":
        blocks = 4 // conv.cluster_of(4, config.cluster) * (out // 64)  # clusters that load low, each all of it
        return HALF * wide * plane * out, HALF * blocks * images * size**2 * into
    clusters = tiles // conv.cluster_of(tiles, config.cluster)
    return HALF * wide * plane * into, HALF * clusters * wide * 16 * into * config.columns


LOADED = [
    ("conv", 2, 1, 8, 64, 128, CudaConfig(64)),
    ("conv", 2, 2, 16, 128, 64, CudaConfig(64, 4)),
    ("conv", 3, 1, 5, 64, 128, CudaConfig(128, 2)),
    ("conv_transpose", 2, 1, 8, 64, 64, CudaConfig(64)),
    ("conv_transpose", 2, 2, 16, 64, 128, CudaConfig(128, 4)),
    ("wgrad", 3, 1, 8, 64, 64, CudaConfig(64)),
    ("wgrad", 9, 1, 4, 128, 128, CudaConfig(64, 2)),
    ("wgrad", 3, 1, 16, 128, 64, CudaConfig(128, 4)),
]


@pytest.mark.parametrize("kernel, images, groups, size, into, out, config", LOADED)
def test_each_pixel_is_loaded_once_for_four_taps_and_weights_once_a_cluster(
    traffic, kernel, images, groups, size, into, out, config
):
    low, high = (images, size, size), (images, 2 * size, 2 * size)
    if kernel == "wgrad":
        first, second, names, more = noise(*low, into), noise(*high, out), ("high", "low"), ()
    else:
        first = noise(*(high if kernel == "conv" else low), into)
        second = noise(*((out, 4, 4, into) if kernel == "conv" else (into, 4, 4, out)))
        names, more = ("x", "w"), (Epilogue(statistics=True, groups=groups),)
    moved = traffic(lambda: getattr(conv, kernel)(first, second, *more, config=config))[
        "wgrad_sm90" if kernel == "wgrad" else "conv_sm90"
    ]
    expected = from_l2(kernel, images, groups, size, into, out, config)
    assert tuple(moved[name][0] for name in names) == expected


def triton_from_l2(problem):
    """The same of Triton's default tiles: a box of pixels for each tap, and the weight's part for each box."""
    from kernels._triton.config import PHASES, boxes, cdiv, conv_config, wgrad_config

    p, groups = problem, problem.use.groups
    if p.kernel == "wgrad":
        c = wgrad_config(p.images, p.low, p.low, p.into, p.out, HALF, 90)
        tiles = cdiv(p.into, c.rows) * 16 // c.taps * cdiv(p.out, c.columns)
        return HALF * tiles * boxes(pixel_box(c), p.images, p.low, p.low) * c.depth * (c.rows + c.columns * c.taps)
    c = conv_config(p.kernel, p.images // groups, groups, p.low, p.low, (p.into, p.out), HALF, 90)
    phases = PHASES[p.kernel]
    tiles = groups * boxes(pixel_box(c), p.images // groups, p.low, p.low) * phases * cdiv(p.out, c.columns)
    return HALF * tiles * 16 // phases * p.into * (c.rows + c.columns)


def pixel_box(config):
    return config.images, config.height, config.width


def test_what_the_products_of_a_step_load_is_what_the_docs_say():
    pytest.importorskip("triton")
    from bench.subjects.problems import step_problems

    ours, theirs = {"conv": 0, "conv_transpose": 0, "wgrad": 0}, {"conv": 0, "conv_transpose": 0, "wgrad": 0}
    for p in step_problems(ARCH, 128):
        if min(p.into, p.out) < 64:
            continue
        if p.kernel == "wgrad":
            config = conv.wgrad_config(p.into)
        else:
            tiles = p.use.groups * conv.boxes(p.images // p.use.groups, p.low, p.low)
            config = conv.default_config(tiles, 4 if p.kernel == "conv_transpose" else 1, p.out)
        ours[p.kernel] += sum(from_l2(p.kernel, p.images, p.use.groups, p.low, p.into, p.out, config))
        theirs[p.kernel] += triton_from_l2(p)
    said = (CSRC.parent / "docs" / "cuda_convolution.md").read_text()
    for kernel in ours:
        row = f"| `{kernel}` | {theirs[kernel] / 1e9:.2f} | {ours[kernel] / 1e9:.2f} |"
        assert row in said, row
    row = f"| all | {sum(theirs.values()) / 1e9:.2f} | {sum(ours.values()) / 1e9:.2f} |"
    assert row in said, row
