"""conv_transpose k4 s2 p1 onto an image: a generator's last layer, and the gradient of the images that D's first read.

With 1 to 4 output channels a phase would fill a quarter of the narrowest tensor-core tile. So the four phases go side
by side into one tile of columns: pixel (i, j) makes the 2×2 block of outputs below it from its 3×3 neighbourhood.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import ConvConfig, cdiv, pixel_box, power_of_two
from kernels._triton.epilogue import activate, derivative
from kernels._triton.launch import Job, Launch, arch_of, box_view, on_tensor_cores
from kernels._triton.prologue import applied, prologue
from kernels.geometry import Deferred, Epilogue, raw

MODES = ("activation", "activation_grad")
MOST_CHANNELS = 4


@triton.jit
def conv_transpose_image_kernel(
    x, x_state, w, y, saved, per_group, groups,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BEFORE: tl.constexpr, BEFORE_SLOPE: tl.constexpr,
):  # fmt: skip
    """y[n,2i+p,2j+q,o] = act(Σ_{s,t∈{−1,0,1},c} x[n,i+s,j+t,c] · w[c,1+p−2s,1+q−2t,o]), w being 0 past its taps;
    with x_state, of x batch-normed and activated as it is loaded.

    Tile: a box of BI×BH×BW input pixels by all 4·CO outputs (p, q, o) of each; 9 taps of C channels, BK at a time.
    Bytes: x and y once from memory; x 9 times from L2, where phase by phase it would be 16 times.
    Accumulates in fp32.
    Beats the library by the activation, or its derivative, and by 12 of 16 columns in use instead of 3.
    """
    BM: tl.constexpr = BI * BH * BW
    KC: tl.constexpr = (C + BK - 1) // BK
    TW: tl.constexpr = (W + BW - 1) // BW
    TH: tl.constexpr = (H + BH - 1) // BH
    boxes = (per_group + BI - 1) // BI * TH * TW
    group, box = tl.program_id(0) // boxes, tl.program_id(0) % boxes
    w0, h0, n0 = box % TW * BW, box // TW % TH * BH, box // (TW * TH) * BI
    r = tl.arange(0, BM)
    n, h, q = n0 + r // (BW * BH), h0 + r // BW % BH, w0 + r % BW
    valid = (n < per_group) & (h < H) & (q < W)
    n, n0 = group * per_group + n, group * per_group + n0
    column = tl.arange(0, BN)
    py, px, o = column // (2 * CO), column // CO % 2, column % CO
    real = column < 4 * CO
    k = tl.arange(0, BK)

    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, 9 * KC):
        tap, k0 = step // KC, step % KC * BK
        s, t = tap // 3 - 1, tap % 3 - 1
        iy, ix = h + s, q + t
        seen = (valid & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W))[:, None]
        if TMA:
            a = x.load([n0, h0 + s, w0 + t, k0]).reshape(BM, BK)
        else:
            pixel = ((n * H + iy) * W + ix).to(tl.int64) * C
            a = tl.load(x + pixel[:, None] + (k0 + k)[None, :], seen & (k0 + k < C)[None, :], 0.0)
        if x_state is not None:
            a = applied(a, seen, x_state, group, groups, k0 + k, C, BEFORE, BEFORE_SLOPE)
        ky, kx = 1 + py - 2 * s, 1 + px - 2 * t
        taps = real & (ky >= 0) & (ky < 4) & (kx >= 0) & (kx < 4)
        at = (k0 + k)[:, None] * (16 * CO) + ((ky * 4 + kx) * CO + o)[None, :]
        b = tl.load(w + at, (k0 + k < C)[:, None] & taps[None, :], 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    corner = ((n * 2 * H + 2 * h) * 2 * W + 2 * q).to(tl.int64) * CO
    offsets = corner[:, None] + ((py * 2 * W + px) * CO + o)[None, :]
    mask = valid[:, None] & real[None, :]
    if MODE == "activation_grad":
        acc *= derivative(tl.load(saved + offsets, mask=mask, other=0.0).to(tl.float32), ACTIVATION, SLOPE)
    else:
        acc = activate(acc, ACTIVATION, SLOPE)
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)


def image_job(
    x: Tensor | Deferred,
    weight: Tensor,
    y: Tensor,
    epilogue: Epilogue,
    precision: str,
    arch: int | None,
    config: ConvConfig | None,
) -> Job:
    """The job of `conv_transpose` where its output y has at most `MOST_CHANNELS` channels; all arguments checked.

    `config.columns` is not read: the tile holds 4·CO outputs of each pixel.
    """
    before, groups = prologue(x), epilogue.groups
    x = raw(x)
    images, h, w, into = x.shape
    out, itemsize = y.shape[3], x.element_size()
    if config is None:
        matrix = on_tensor_cores(x, precision)
        depth = min(128 // itemsize if matrix else 16, max(16, power_of_two(into)))
        tma = matrix and (arch or arch_of(x)) >= 90 and into * itemsize % 16 == 0
        config = ConvConfig(*pixel_box(128, h, w), 16, depth, 4, 3, tma)
    c = config
    box = (c.images, c.height, c.width)
    arguments = {
        "x": box_view(x, tuple(x.shape), (*box, c.depth)) if c.tma else x,
        "w": weight, "y": y, "saved": epilogue.saved,
        "per_group": images // groups, "groups": groups, "H": h, "W": w, "C": into, "CO": out,
        "BI": c.images, "BH": c.height, "BW": c.width, "BN": 16, "BK": c.depth, "MODE": epilogue.mode,
        "ACTIVATION": epilogue.activation, "SLOPE": epilogue.slope, "PRECISION": precision, "TMA": c.tma,
        **before,
    }  # fmt: skip
    grid = (groups * cdiv(images // groups, c.images) * cdiv(h, c.height) * cdiv(w, c.width),)
    return Job((Launch(conv_transpose_image_kernel, grid, arguments, c.warps, c.stages),), (y, None))
