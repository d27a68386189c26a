"""conv_transpose k4 s2 p1, NHWC: a generator's forward pass, and the data gradient of a discriminator's layer."""

import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import IMAGE_CHANNELS, ConvConfig, cdiv, conv_config
from kernels._triton.conv_transpose_image import image_job
from kernels._triton.dependent import after_previous
from kernels._triton.epilogue import PART_COLUMNS, check_epilogue, empty_partials, finish
from kernels._triton.launch import PRECISIONS, Job, Launch, arch_of, box_view, on_tensor_cores
from kernels._triton.merge import merge, merge_arguments
from kernels._triton.prologue import applied, check_input, prologue
from kernels.geometry import Deferred, Epilogue, Partials, check_nhwc, check_tensor


@triton.jit
def conv_transpose_kernel(
    x, x_state, w, y, saved, state, values, counts, per_group, groups,
    rounds, round_counts, tickets, weight, bias, running_mean, running_var, tracked, merged, rows, eps, momentum,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BEFORE: tl.constexpr, BEFORE_SLOPE: tl.constexpr,
    PART: tl.constexpr, MERGE: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y[n,2i+p,2j+q,o] = Σ_{a,b∈{0,1},c} x[n,i+p−a,j+q−b,c] · w[c,1−p+2a,1−q+2b,o], then the epilogue;
    with x_state, of x batch-normed and activated as it is loaded.

    Tile: one phase (p, q) of a box of BI×BH×BW input-sized pixels by BN channels; 4 taps of C channels, BK at a time.
    Bytes: x, w and y once from memory; from L2 x ⌈CO/BN⌉·16 times, the four phases of a box being neighbours.
    Accumulates in fp32, which the epilogue sees before it is rounded.
    Beats the library as conv does, and a zero-stuffing one fourfold: no product with a stuffed zero is ever formed.
    """
    after_previous(DEPENDENT)
    BM: tl.constexpr = BI * BH * BW
    KC: tl.constexpr = (C + BK - 1) // BK
    TW: tl.constexpr = (W + BW - 1) // BW
    TH: tl.constexpr = (H + BH - 1) // BH
    TN: tl.constexpr = (CO + BN - 1) // BN
    boxes = (per_group + BI - 1) // BI * TH * TW
    pid = tl.program_id(0)
    column, phase, pixel_tile = pid % TN * BN, pid // TN % 4, pid // (TN * 4)
    py, px = phase // 2, phase % 2
    group, box = pixel_tile // boxes, pixel_tile % boxes
    w0, h0, n0 = box % TW * BW, box // TW % TH * BH, box // (TW * TH) * BI

    r = tl.arange(0, BM)
    n, h, q = n0 + r // (BW * BH), h0 + r // BW % BH, w0 + r % BW
    valid = (n < per_group) & (h < H) & (q < W)
    image = group * per_group + n
    columns = column + tl.arange(0, BN)
    k = tl.arange(0, BK)
    nearest = ((image * H + h + py) * W + q + px).to(tl.int64) * C  # the input pixel of tap a = b = 0

    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, 4 * KC):
        tap, k0 = step // KC, step % KC * BK
        a, b = tap // 2, tap % 2
        at = (1 - py + 2 * a) * 4 + 1 - px + 2 * b  # the tap's place among the weight's sixteen
        iy, ix = h + py - a, q + px - b
        seen = (valid & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W))[:, None]
        if TMA:
            pixels = x.load([group * per_group + n0, h0 + py - a, w0 + px - b, k0]).reshape(BM, BK)
            weights = w.load([k0, at * CO + column])
        else:
            here = k0 + k < C
            pixels = tl.load(x + nearest[:, None] + (k0 + k - (a * W + b) * C)[None, :], seen & here[None, :], 0.0)
            weights = tl.load(
                w + (k0 + k)[:, None] * (16 * CO) + (at * CO + columns)[None, :],
                here[:, None] & (columns < CO)[None, :],
                0.0,
            )
        if x_state is not None:
            pixels = applied(pixels, seen, x_state, group, groups, k0 + k, C, BEFORE, BEFORE_SLOPE)
        acc = tl.dot(pixels, weights, acc, input_precision=PRECISION)

    places = ((image * 2 * H + 2 * h + py) * 2 * W + 2 * q + px).to(tl.int64)
    finish(
        acc, y, saved, state, values, counts, places, valid, column, group, groups, box * 4 + phase, boxes * 4,
        CO, MODE, ACTIVATION, SLOPE, PART,
    )  # fmt: skip
    if MERGE:
        merge(
            values, counts, rounds, round_counts, tickets, weight, bias, running_mean, running_var, tracked, merged,
            column, group, groups, box * 4 + phase, boxes * 4, rows, eps, momentum, CO, BN, MODE, TOGETHER, WIDTH,
        )  # fmt: skip


def prepare_conv_transpose(
    x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee",
    config: ConvConfig | None = None, arch: int | None = None, out: Tensor | None = None,
) -> Job:  # fmt: skip
    """The job of `conv_transpose`; see there. The default tile is that of capability `arch`, or of the device."""
    epilogue, given = epilogue or Epilogue(), x
    x = check_input("x", given, groups=epilogue.groups)
    check_nhwc("weight", weight, x)
    images, h, w, into = x.shape
    channels = weight.shape[3]
    check_tensor("weight", weight, (into, 4, 4, channels), x.dtype, x)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: accepted are {PRECISIONS}")
    shape = (images, 2 * h, 2 * w, channels)
    y = x.new_empty(shape) if out is None else out
    check_tensor("out", y, shape, x.dtype, x)
    check_epilogue(epilogue, y, images)
    if channels <= IMAGE_CHANNELS and epilogue.mode in ("activation", "activation_grad"):
        return image_job(given, weight, y, epilogue, precision, arch, config)
    per_group = images // epilogue.groups
    c = config or conv_config(
        "conv_transpose",
        per_group,
        epilogue.groups,
        h,
        w,
        (into, channels),
        x.element_size(),
        arch or arch_of(x),
        on_tensor_cores(x, precision),
    )
    if c.tma and (into * x.element_size() % 16 or channels * x.element_size() % 16):
        raise ValueError(f"tile {c} uses TMA: {into} and {channels} channels must be multiples of 16 bytes")
    boxes = cdiv(per_group, c.images) * cdiv(h, c.height) * cdiv(w, c.width)
    partials = empty_partials(epilogue, boxes * 4, y)
    arguments = {
        "x": box_view(x, tuple(x.shape), (c.images, c.height, c.width, c.depth)) if c.tma else x,
        "w": box_view(weight, (into, 16 * channels), (c.depth, c.columns)) if c.tma else weight,
        "y": y, "saved": epilogue.saved, "state": epilogue.state,
        "values": partials and partials.values, "counts": partials and partials.counts,
        "per_group": per_group, "groups": epilogue.groups, "H": h, "W": w, "C": into, "CO": channels,
        "BI": c.images, "BH": c.height, "BW": c.width, "BN": c.columns, "BK": c.depth,
        "MODE": epilogue.mode, "ACTIVATION": epilogue.activation, "SLOPE": epilogue.slope,
        "PRECISION": precision, "TMA": c.tma, "PART": PART_COLUMNS[epilogue.mode],
        **prologue(given),
        **merge_arguments(
            epilogue, partials and partials.values, boxes * 4, cdiv(channels, c.columns), per_group * 4 * h * w
        ),
    }  # fmt: skip
    grid = (epilogue.groups * boxes * 4 * cdiv(channels, c.columns),)
    result = partials if arguments["merged"] is None else arguments["merged"]
    return Job((Launch(conv_transpose_kernel, grid, arguments, c.warps, c.stages),), (y, result))


def conv_transpose(
    x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee",
    config: ConvConfig | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Partials | Tensor | None]:  # fmt: skip
    """Transposed convolution of kernel 4, stride 2, padding 1, without bias, and its epilogue.

    Args:
        x: (N, H, W, C) bfloat16, float16 or float32, contiguous; or `Deferred`, as for `conv`.
        weight: (C, 4, 4, O) of x's dtype, contiguous: a ConvTranspose2d's weight (C, O, 4, 4), or for its data
            gradient a Conv2d's (out, in, 4, 4), in channels_last memory and permuted by (0, 2, 3, 1): the layout
            that `conv` and `wgrad` have too. Its rows are read along O, which wgmma takes as it is in 16 bits.
        epilogue, precision, config: as for `conv`.
        out: where y goes; None: a new tensor.

    Returns:
        y (N, 2H, 2W, O) of x's dtype, and the tiles' `Partials` or what became of them, as of `conv`.

    Raises:
        ValueError: a shape, dtype, layout or configuration that does not fit, by name.
    """
    return prepare_conv_transpose(x, weight, epilogue, precision, config, out=out).run()
