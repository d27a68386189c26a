"""conv_transpose k4 s2 p1 onto an image: a generator's last layer, and the gradient of the images that D's first read.

With 1 to 4 output channels a phase would fill a quarter of the narrowest tensor-core tile, and its taps would load each
pixel nine to sixteen times for products that take next to no time. So the product comes first: each pixel by all of the
weight, once. An output is then the sum of four of these products, of its own pixel and of three neighbours, which lie
in the same tile: the tile has a rim of one pixel wherever the picture goes on.

Input pixel (i, j) owns the 2×2 outputs (2i+p, 2j+q), p and q in {0, 1}, one at each of its corners. Output (p, q) adds
a product of each of the four pixels that meet at its corner. For (0, 0), and with the names in the kernel, those are

             j−1         j
         +---------+---------+
    i−1  | corner  |  above  |       corner   a = 1, b = 1: the pixel across the corner
         +---------+---------+       above    a = 1, b = 0: one row towards the corner, i + s
      i  |  left   |0,0 :0,1 |       left     a = 0, b = 1: one column towards the corner, j + t
         |         |....:....|       z        a = 0, b = 0: the pixel itself, shown with its four outputs p,q
         |         |1,0 :1,1 |
         +---------+---------+

    y[2i+p, 2j+q] = z[i, j] + left[i, j+t] + above[i+s, j] + corner[i+s, j+t],    s = 2p − 1, t = 2q − 1

For p = 1 "above" is the row below, and for q = 1 "left" is the column on the right. `acc` has all of a pixel's 64
columns, (a, b, p, q, o). The first `split` parts b = 0 from b = 1, the two after it a = 0 from a = 1: that makes four
tensors of columns (p, q, o). `neighbours` then shifts along one side at a time, each column by its own t or s: left by
t onto z, corner by t onto above, and above, which now has both, by s onto z; the epilogue follows.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import ConvConfig, cdiv, image_config, inner, tma_fits
from kernels._triton.dependent import after_previous
from kernels._triton.epilogue import activate, derivative
from kernels._triton.launch import Job, Launch, arch_of, box_view, on_tensor_cores
from kernels._triton.prologue import applied, prologue
from kernels.geometry import Deferred, Epilogue, raw


@triton.jit
def neighbours(z, first, SIZE: tl.constexpr, B: tl.constexpr, APART: tl.constexpr, PERIOD: tl.constexpr):
    """z (pixels, columns) of the next pixel towards each column's corner, along one side of the box; 0 off the picture.

    The side has B pixels, from the picture's `first` of SIZE on, which lie APART in z; a column's corner is column //
    PERIOD % 2. One side at a time, since `tl.gather` shuffles along its axis within a warp: all of a tile's 256 rows at
    once took 291 shuffles per thread where this takes 48 (sm_90, Triton 3.7.1).
    """
    M: tl.constexpr = z.shape[0]
    N: tl.constexpr = z.shape[1]
    corner = tl.arange(0, APART * N) % N // PERIOD % 2
    to = tl.arange(0, B)[:, None] + (2 * corner - 1)[None, :]
    there = (first + to >= 0) & (first + to < SIZE)
    side = z.reshape(M // (B * APART), B, APART * N)
    index = tl.minimum(tl.maximum(to, 0), B - 1)[None, :, :].broadcast_to(side.shape)
    return tl.where(there[None, :, :], tl.gather(side, index, 1), 0.0).reshape(M, N)


@triton.jit
def conv_transpose_image_kernel(
    x, x_state, w, y, saved, per_group, groups,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr, BK: tl.constexpr,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BEFORE: tl.constexpr, BEFORE_SLOPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """z[n,i,j,(a,b,p,q,o)] = Σ_c x[n,i,j,c] · w[c,1+p−2s,1+q−2t,o] with s = a·(2p−1), t = b·(2q−1), and
    y[n,2i+p,2j+q,o] = act(Σ_{a,b∈{0,1}} z[n,i+s,j+t,(a,b,p,q,o)]); with x_state, of x batch-normed and activated.

    Tile: a box of BI×BH×BW input pixels by all 16·CO products of each; it owns the outputs of the inner IH×IW.
    Bytes: x and y once from memory; from L2 x BH·BW / (IH·IW) times, 1.5 at 32×32, where tap by tap it would be 9.
    Accumulates in fp32; the four addends of an output, in a fixed order.
    Beats the library by the activation, or its derivative, and by loads: of its GEMM's columns 61 in 64 are empty.
    """
    after_previous(DEPENDENT)
    BM: tl.constexpr = BI * BH * BW
    TH: tl.constexpr = (H + IH - 1) // IH
    TW: tl.constexpr = (W + IW - 1) // IW
    RIM_H: tl.constexpr = (BH - IH) // 2
    RIM_W: tl.constexpr = (BW - IW) // 2
    boxes = (per_group + BI - 1) // BI * TH * TW
    group, box = tl.program_id(0) // boxes, tl.program_id(0) % boxes
    w0, h0, n0 = box % TW * IW - RIM_W, box // TW % TH * IH - RIM_H, box // (TW * TH) * BI
    r, k = tl.arange(0, BM), tl.arange(0, BK)
    n, h, q = n0 + r // (BW * BH), h0 + r // BW % BH, w0 + r % BW
    valid = (n < per_group) & (h >= 0) & (h < H) & (q >= 0) & (q < W)
    n, n0 = group * per_group + n, group * per_group + n0
    pixel = ((n * H + h) * W + q).to(tl.int64)

    column = tl.arange(0, 64)  # (a, b, p, q, o), the last three padded to 16
    part, py, px = column // 16, column % 16 // (2 * CO), column % 16 // CO % 2
    tap = (1 + py - 2 * (part // 2) * (2 * py - 1)) * 4 + 1 + px - 2 * (part % 2) * (2 * px - 1)
    acc = tl.zeros((BM, 64), tl.float32)
    for k0 in range(0, C, BK):
        if TMA:
            a = x.load([n0, h0, w0, k0]).reshape(BM, BK)
        else:
            a = tl.load(x + pixel[:, None] * C + (k0 + k)[None, :], valid[:, None] & (k0 + k < C)[None, :], 0.0)
        if x_state is not None:
            a = applied(a, valid[:, None], x_state, group, groups, k0 + k, C, BEFORE, BEFORE_SLOPE)
        at = (k0 + k)[:, None] * (16 * CO) + (tap * CO + column % 16 % CO)[None, :]
        b = tl.load(w + at, (k0 + k < C)[:, None] & (column % 16 < 4 * CO)[None, :], 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    beside, apart = acc.reshape(BM, 2, 2, 16).permute(0, 3, 1, 2).split()  # b = 0 and 1, each (pixels, 16, a)
    z, above = beside.split()  # a = 0 and 1, each (pixels, 16)
    left, corner = apart.split()
    column = tl.arange(0, 16)
    py, px, o = column // (2 * CO), column // CO % 2, column % CO
    z += neighbours(left, w0, W, BW, 1, CO)  # from column j + t
    above += neighbours(corner, w0, W, BW, 1, CO)
    z += neighbours(above, h0, H, BH, BW, 2 * CO)  # from row i + s

    first = ((n * 2 * H + 2 * h) * 2 * W + 2 * q).to(tl.int64) * CO
    offsets = first[:, None] + ((py * 2 * W + px) * CO + o)[None, :]
    within = (r // BW % BH >= RIM_H) & (r // BW % BH < RIM_H + IH) & (r % BW >= RIM_W) & (r % BW < RIM_W + IW)
    mask = (valid & within)[:, None] & (column < 4 * CO)[None, :]
    if MODE == "activation_grad":
        z *= derivative(tl.load(saved + offsets, mask=mask, other=0.0).to(tl.float32), ACTIVATION, SLOPE)
    else:
        z = activate(z, ACTIVATION, SLOPE)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=mask)


def image_job(
    x: Tensor | Deferred, weight: Tensor, y: Tensor, epilogue: Epilogue, precision: str, arch: int | None,
    config: ConvConfig | None,
) -> Job:  # fmt: skip
    """The job of `conv_transpose` where its output y has at most `IMAGE_CHANNELS` channels; all arguments checked.

    `config.columns` is not read: the tile holds all products of each pixel.
    """
    before, x, groups = prologue(x), raw(x), epilogue.groups
    images, h, w, into = x.shape
    c = config or image_config(h, w, into, x.element_size(), arch or arch_of(x), on_tensor_cores(x, precision))
    rows, columns = inner(h, c.height), inner(w, c.width)
    if c.tma and not tma_fits((into,), x.element_size()):
        raise ValueError(f"tile {c} uses TMA: {into} channels must be a multiple of 16 bytes")
    if rows < 1 or columns < 1:
        raise ValueError(
            f"tile {c}, pictures of {h}×{w}: each side needs a rim, so at least 4 pixels, or must cover the picture"
        )
    arguments = {
        "x": box_view(x, tuple(x.shape), (c.images, c.height, c.width, c.depth)) if c.tma else x,
        "w": weight, "y": y, "saved": epilogue.saved, "per_group": images // groups, "groups": groups,
        "H": h, "W": w, "C": into, "CO": y.shape[3],
        "BI": c.images, "BH": c.height, "BW": c.width, "IH": rows, "IW": columns, "BK": c.depth,
        "MODE": epilogue.mode, "ACTIVATION": epilogue.activation, "SLOPE": epilogue.slope,
        "PRECISION": precision, "TMA": c.tma, **before,
    }  # fmt: skip
    grid = (groups * cdiv(images // groups, c.images) * cdiv(h, rows) * cdiv(w, columns),)
    return Job((Launch(conv_transpose_image_kernel, grid, arguments, c.warps, c.stages),), (y, None))
