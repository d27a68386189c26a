"""conv k4 s2 p1, NHWC: a discriminator's forward pass, and the data gradient of a generator's layer."""

import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import FLAT_CHANNELS, ConvConfig, cdiv, conv_config
from kernels._triton.dependent import after_previous
from kernels._triton.epilogue import PART_COLUMNS, check_epilogue, empty_partials, finish
from kernels._triton.launch import PRECISIONS, Job, Launch, arch_of, box_view, halves_view, on_tensor_cores
from kernels._triton.merge import merge, merge_arguments
from kernels._triton.prologue import applied, check_input, prologue
from kernels.geometry import Deferred, Epilogue, Partials, check_nhwc, check_tensor


@triton.jit
def conv_kernel(
    x, x_state, w, y, saved, state, values, counts, per_group, groups,
    rounds, round_counts, tickets, weight, bias, running_mean, running_var, tracked, merged, rows, eps, momentum,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    FLAT: tl.constexpr, BEFORE: tl.constexpr, BEFORE_SLOPE: tl.constexpr,
    PART: tl.constexpr, MERGE: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y[n,oy,ox,o] = Σ_{ky,kx,c} x[n,2oy+ky−1,2ox+kx−1,c] · w[o,ky,kx,c], then the epilogue; with x_state, of x
    batch-normed and activated as it is loaded.

    Tile: a box of BI×BH×BW output pixels by BN channels; the reduction, BK at a time, is 16 taps of C channels each,
        or, FLAT, all 16·C in one row (an image's few channels would leave most of BK empty, tap by tap).
    Bytes: x, w and y once from memory; from L2 x ⌈CO/BN⌉·4 times and w once per row of tiles.
    Accumulates in fp32, which the epilogue sees before it is rounded.
    Beats the library by what does not follow: statistics, activation and derivative cost no pass over memory.
    """
    after_previous(DEPENDENT)
    BM: tl.constexpr = BI * BH * BW
    KC: tl.constexpr = (C + BK - 1) // BK
    STEPS: tl.constexpr = (16 * C + BK - 1) // BK if FLAT else 16 * KC
    TW: tl.constexpr = (W + BW - 1) // BW
    TH: tl.constexpr = (H + BH - 1) // BH
    TN: tl.constexpr = (CO + BN - 1) // BN
    tiles = (per_group + BI - 1) // BI * TH * TW
    pid = tl.program_id(0)  # neighbours share their pixels, which L2 then reads once
    column, pixel_tile = pid % TN * BN, pid // TN
    group, tile = pixel_tile // tiles, pixel_tile % tiles
    w0, h0, n0 = tile % TW * BW, tile // TW % TH * BH, tile // (TW * TH) * BI

    r = tl.arange(0, BM)
    n, h, q = n0 + r // (BW * BH), h0 + r // BW % BH, w0 + r % BW
    valid = (n < per_group) & (h < H) & (q < W)
    image = group * per_group + n
    columns = column + tl.arange(0, BN)
    k = tl.arange(0, BK)
    corner = ((image * 2 * H + 2 * h - 1) * 2 * W + 2 * q - 1).to(tl.int64) * C  # of each pixel's window

    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, STEPS):  # taps and channels in one loop, so that the next tap's loads are in flight too
        tap, k0 = step // KC, step % KC * BK
        ky, kx = tap // 4, tap % 4
        iy, ix = 2 * h - 1 + ky, 2 * q - 1 + kx
        seen = (valid & (iy >= 0) & (iy < 2 * H) & (ix >= 0) & (ix < 2 * W))[:, None]
        if TMA:
            first = group * per_group + n0
            a = x.load([first, h0 + (ky + 1) // 2 - 1, (ky + 1) % 2, w0 + (kx + 1) // 2 - 1, (kx + 1) % 2 * C + k0])
            a = a.reshape(BM, BK)
            b = w.load([column, tap * C + k0])
        elif FLAT:
            f = step * BK + k  # the four taps of a row lie side by side in x, as in w
            iy, ix = (2 * h - 1)[:, None] + (f // (4 * C))[None, :], (2 * q - 1)[:, None] + (f // C % 4)[None, :]
            here = (f < 16 * C)[None, :]
            seen = valid[:, None] & here & (iy >= 0) & (iy < 2 * H) & (ix >= 0) & (ix < 2 * W)
            a = tl.load(x + corner[:, None] + (f // (4 * C) * (2 * W * C) + f % (4 * C))[None, :], seen, 0.0)
            b = tl.load(w + columns[:, None] * (16 * C) + f[None, :], (columns < CO)[:, None] & here, 0.0)
        else:
            here = (k0 + k < C)[None, :]
            a = tl.load(x + corner[:, None] + ((ky * 2 * W + kx) * C + k0 + k)[None, :], seen & here, 0.0)
            b = tl.load(
                w + columns[:, None] * (16 * C) + (tap * C + k0 + k)[None, :], (columns < CO)[:, None] & here, 0.0
            )
        if x_state is not None:
            c = (step * BK + k) % C if FLAT else k0 + k
            a = applied(a, seen, x_state, group, groups, c, C, BEFORE, BEFORE_SLOPE)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    places = ((image * H + h) * W + q).to(tl.int64)
    finish(
        acc, y, saved, state, values, counts, places, valid, column, group, groups, tile, tiles,
        CO, MODE, ACTIVATION, SLOPE, PART,
    )  # fmt: skip
    if MERGE:
        merge(
            values, counts, rounds, round_counts, tickets, weight, bias, running_mean, running_var, tracked, merged,
            column, group, groups, tile, tiles, rows, eps, momentum, CO, BN, MODE, TOGETHER, WIDTH,
        )  # fmt: skip


def prepare_conv(
    x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee",
    config: ConvConfig | None = None, arch: int | None = None,
) -> Job:  # fmt: skip
    """The job of `conv`; see there. The default tile is that of capability `arch` (None: the device's own)."""
    epilogue, given = epilogue or Epilogue(), x
    x = check_input("x", given, groups=epilogue.groups)
    images, height, width, into = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: a k4 s2 p1 convolution here takes even heights and widths")
    check_nhwc("weight", weight, x)
    out = weight.shape[0]
    check_tensor("weight", weight, (out, 4, 4, into), x.dtype, x)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: accepted are {PRECISIONS}")
    h, w = height // 2, width // 2
    y = x.new_empty((images, h, w, out))
    check_epilogue(epilogue, y, images)
    per_group = images // epilogue.groups
    c = config or conv_config(
        "conv",
        per_group,
        epilogue.groups,
        h,
        w,
        (into, out),
        x.element_size(),
        arch or arch_of(x),
        on_tensor_cores(x, precision),
    )
    if c.tma and (into % c.depth or into * x.element_size() % 16):
        raise ValueError(f"tile {c} uses TMA: {into} channels must be a multiple of depth and of 16 bytes")
    tiles = cdiv(per_group, c.images) * cdiv(h, c.height) * cdiv(w, c.width)
    partials = empty_partials(epilogue, tiles, y)
    box = (c.images, c.height, c.width)
    arguments = {
        "x": halves_view(x, box, c.depth) if c.tma else x,
        "w": box_view(weight, (out, 16 * into), (c.columns, c.depth)) if c.tma else weight,
        "y": y, "saved": epilogue.saved, "state": epilogue.state,
        "values": partials and partials.values, "counts": partials and partials.counts,
        "per_group": per_group, "groups": epilogue.groups, "H": h, "W": w, "C": into, "CO": out,
        "BI": c.images, "BH": c.height, "BW": c.width, "BN": c.columns, "BK": c.depth,
        "MODE": epilogue.mode, "ACTIVATION": epilogue.activation, "SLOPE": epilogue.slope,
        "PRECISION": precision, "TMA": c.tma, "FLAT": not c.tma and into < FLAT_CHANNELS,
        "PART": PART_COLUMNS[epilogue.mode], **prologue(given),
        **merge_arguments(epilogue, partials and partials.values, tiles, cdiv(out, c.columns), per_group * h * w),
    }  # fmt: skip
    grid = (epilogue.groups * tiles * cdiv(out, c.columns),)
    result = partials if arguments["merged"] is None else arguments["merged"]
    return Job((Launch(conv_kernel, grid, arguments, c.warps, c.stages),), (y, result))


def conv(
    x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee",
    config: ConvConfig | None = None,
) -> tuple[Tensor, Partials | Tensor | None]:  # fmt: skip
    """Convolution of kernel 4, stride 2, padding 1, without bias, and its epilogue.

    Args:
        x: (N, 2H, 2W, C) bfloat16, float16 or float32, contiguous; or, `Deferred`, such a map before its batch norm
            and activation, in as many groups as the epilogue has.
        weight: (O, 4, 4, C) of x's dtype, contiguous: a Conv2d's weight (O, C, 4, 4), or for its data gradient a
            ConvTranspose2d's (in, out, 4, 4), in channels_last memory and permuted by (0, 2, 3, 1). This one layout
            serves every pass of a layer, so weights are packed once per update, by a mere cast.
        epilogue: what happens to the accumulator; None: kept as it is.
        precision: of float32 products: `ieee`, or `tf32` (tensor cores).
        config: the tile; None: a default.

    Returns:
        y (N, H, W, O) of x's dtype, and the tiles' `Partials` where the epilogue takes sums, or what became of them
        where it merges them: the batch-norm state (4, groups, O), or the gradient's means (2, groups, O), float32.

    Raises:
        ValueError: a shape, dtype, layout or configuration that does not fit, by name.
    """
    return prepare_conv(x, weight, epilogue, precision, config).run()
