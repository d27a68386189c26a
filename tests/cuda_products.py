"""The extension's k4 s2 p1 convolutions on a CPU against their twins, whatever kernel computes them."""

import torch
from epilogues import doubled, epilogue_of
from interpreter import assert_accurate, tensor

from kernels import reference
from kernels.geometry import Epilogue

TWIN = {"conv": reference.conv, "conv_transpose": reference.conv_transpose}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = [
    ("activation", "relu"),
    ("activation", "tanh"),
    ("activation_grad", "leaky_relu"),
    ("activation_grad", "tanh"),
    ("batch_norm_grad", "relu"),
    ("batch_norm_grad", "leaky_relu"),
    ("batch_norm_grad", "none"),
    ("statistics", "none"),
]


def merged(partials):
    """Partials of any number of tiles as one tile a group, in float64."""
    values = partials.values.double()
    if partials.counts is None:
        return values.sum(2)
    counts = partials.counts.double()[:, :, None]
    mean = (counts * values[0]).sum(1) / counts.sum(1)
    return torch.stack([mean, (values[1] + counts * (values[0] - mean[:, None]).square()).sum(1)])


def check_product(
    launch, kind, dtype, images, groups, height, width, into, out, mode="activation", activation="none", mean=0.0,
    sums_of=None, seed=0, **options,
):  # fmt: skip
    """One convolution by `launch`.

    Args:
        images: of a group.
        height, width: of the low side.
        mode, activation: of the epilogue, as in `MODES`.
        mean: of every output, about.
        sums_of: the type that a product is rounded to before its sums are taken; float32 where they are of the
            accumulator.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, high, low = images * groups, (2 * height, 2 * width), (height, width)
    x_size, y_size, ends = (high, low, (out, into)) if kind == "conv" else (low, high, (into, out))
    x = tensor(generator, batch, *x_size, into, dtype=dtype)
    weight = tensor(generator, ends[0], 4, 4, ends[1], dtype=dtype)
    weight *= 0.25 / into**0.5
    if mean:
        weight += mean / into
        x += 1
    epilogue = epilogue_of(generator, mode, activation, groups, (batch, *y_size, out), dtype)
    y, partials = launch(x, weight, epilogue, **options)
    twin, twin_partials = TWIN[kind](x, weight, epilogue)
    oracle, oracle_partials = TWIN[kind](x.double(), weight.double(), doubled(epilogue))
    assert_accurate(y, twin, oracle, kind)
    if not epilogue.sums:
        assert partials is None
        return
    seen, terms = sums_of or torch.float32, images * y_size[0] * y_size[1]
    if seen == torch.float32:
        twin_partials = TWIN[kind](x.float(), weight.float(), single(epilogue))[1]
    ours, theirs, exact = (merged(p) for p in (partials, twin_partials, oracle_partials))
    if mode == "statistics":
        assert torch.equal(partials.counts.sum(1).double(), oracle_partials.counts[:, 0])
        for name, *found in zip(("mean", "M2"), ours.to(seen), theirs, exact, strict=True):
            assert_accurate(*found, f"{kind} {name}", terms=terms)
        return
    # terms of either sign cancel, so the bar grows with them, not with their sum
    spread = 8 * torch.finfo(seen).eps * terms**0.5 * oracle.abs().max()
    error, allowed = (ours - exact).abs().max(), 2 * (theirs - exact).abs().max() + spread
    assert error <= allowed, f"{kind} sums: error {error:.3g}, allowed {allowed:.3g}"


def single(epilogue):
    saved = None if epilogue.saved is None else epilogue.saved.float()
    return Epilogue(
        epilogue.activation, epilogue.slope, epilogue.groups, epilogue.statistics, saved=saved, state=epilogue.state
    )
