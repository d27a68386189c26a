"""Batch norm settled by the last programs of a GEMM: both rounds of the merge, against the twin in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, fenced, generated, only_interpreted, run_guarded, tensor

from kernels import reference
from kernels.geometry import Epilogue, Merge, MergeGradients

only_interpreted()

from kernels._triton.config import ConvConfig  # noqa: E402
from kernels._triton.conv import prepare_conv  # noqa: E402
from kernels._triton.conv_transpose import prepare_conv_transpose  # noqa: E402
from kernels._triton.merge import TOGETHER, WIDTH  # noqa: E402

PREPARE = {"conv": prepare_conv, "conv_transpose": prepare_conv_transpose}
TILE = ConvConfig(1, 4, 4, 16, 64, 4, 2, False)  # 16 pixels, so that small pictures have many tiles
INTO = 4  # channels: all taps of a convolution are one step of its reduction


def check_merge(
    kind, images, groups, size, channels, backward, config=TILE, dtype=torch.float32, shift=0.0, seed=0, times=1
):
    """One layer whose output has `channels` and whose low-resolution side is `size`."""
    generator = torch.Generator().manual_seed(seed)
    batch, into = images * groups, INTO
    x_size, y_size = (2 * size, size) if kind == "conv" else (size, 2 * size)
    x = tensor(generator, batch, x_size, x_size, into, dtype=dtype)
    weight = tensor(generator, *((channels, 4, 4, into) if kind == "conv" else (into, 4, 4, channels)), dtype=dtype)
    weight.mul_(0.25).add_(shift)
    saved = tensor(generator, batch, y_size, y_size, channels, dtype=dtype)
    state = fenced(reference.merge_statistics(reference.statistics(saved, groups), *vectors(generator, channels)))
    for _ in range(times):
        twins = [vectors(generator, channels)]
        twins += [[t.clone() for t in twins[0]], [t.double() for t in twins[0]]]
        start, results = [t.clone() for t in twins[0]], []
        for (first, second, mean, var), run in zip(twins, ("ours", "twin", "exact"), strict=True):
            tracked = torch.tensor(3)
            if backward:
                merge = MergeGradients(first, second)
                epilogue = Epilogue("leaky_relu", groups=groups, saved=saved, state=state, merge=merge)
            else:
                merge = Merge(first, second, mean, var.abs_(), tracked, 1e-5, 0.2)
                epilogue = Epilogue(groups=groups, statistics=True, merge=merge)
            if run == "ours":
                job = PREPARE[kind](x, weight, epilogue, config=config)
                y, merged = run_guarded(job, x, weight, saved, state, tracked, first, second, mean, var)
            else:
                wide = [t.double() if run == "exact" else t for t in (x, weight, saved, state)]
                if backward:
                    epilogue = replace(epilogue, saved=wide[2], state=wide[3])
                y, merged = getattr(reference, kind)(*wide[:2], epilogue)
            if not backward:
                assert tracked == 3 + groups
            results.append((y, merged, first, second, mean, var))
        if not backward and dtype == torch.float32:  # of our own output: few near values would multiply its rounding
            first, second, mean, var = (t.double() for t in start)
            merge = Merge(first, second, mean, var.abs_(), torch.tensor(3), 1e-5, 0.2)
            own = reference.statistics(results[0][0].double(), groups, merge)
            results[2] = (results[2][0], own, first, second, mean, var)
        exact_y, exact_state = results[2][:2]
        strays = getattr(reference, kind)(x.double().square(), weight.double().square())[0].sqrt()
        sums = exact_y.abs().max() * (images * y_size**2) ** 0.5
        addends = {"y": [strays], "weight": [sums], "bias": [sums], "mean": [start[2], exact_y]}
        if backward:  # sums and means of g and of g·x̂: of few pixels they stray as far as g does
            x_hat = (reference.grouped(saved.double(), groups) - state[0][:, None]) * state[1][:, None]
            far = strays * x_hat.abs().max().clamp(min=1)
            addends |= {"merged": [far], "weight": [sums, far], "bias": [sums, far]}
        else:
            addends |= {"var": [start[3], exact_state[1] ** -2], "merged": [exact_y]}
        for what, ours, twin, exact in zip(("y", "merged", "weight", "bias", "mean", "var"), *results, strict=True):
            terms = 16 * into if what == "y" else images * y_size**2
            assert_accurate(ours, twin, exact, what, terms=terms, addends=addends.get(what, ()))


def vectors(generator, channels):
    return [tensor(generator, channels) for _ in range(4)]


@pytest.mark.parametrize("backward", [False, True], ids=["statistics", "gradient"])
@pytest.mark.parametrize(
    ("kind", "images", "groups", "size", "channels"),
    [
        ("conv", 1, 1, 4, 16),  # one tile
        ("conv", 3, 2, 10, 20),  # 27 tiles a group, so two rounds a group; two column tiles, the last one overhanging
        ("conv_transpose", 2, 1, 10, 16),  # 18 boxes of four phases
        ("conv_transpose", 1, 3, 5, 24),
    ],
)
def test_merge(kind, images, groups, size, channels, backward):
    check_merge(kind, images, groups, size, channels, backward)


def test_the_tickets_serve_again():
    check_merge("conv", 3, 2, 6, 20, False, times=3)


def test_merge_of_wide_tiles_goes_by_parts():
    check_merge("conv", 1, 2, 4, 2 * WIDTH, False, ConvConfig(1, 4, 4, 2 * WIDTH, 64, 4, 2, False))


def test_merge_far_from_zero():
    """E[y²] − mean² would be negative here."""
    check_merge("conv", 2, 1, 4, 16, False, shift=20.0)


def test_rounds_are_of_whole_and_of_partial_groups_of_tiles():
    """Exactly TOGETHER tiles, and one more."""
    check_merge("conv", TOGETHER, 1, 4, 16, False)
    check_merge("conv", TOGETHER + 1, 1, 4, 16, True)


@pytest.mark.parametrize(
    ("epilogue", "message"),
    [
        (Epilogue(merge=MergeGradients()), "takes no sums"),
        (Epilogue(statistics=True, merge=Merge(torch.ones(3), torch.ones(16))), r"merge.weight has shape \(3,\)"),
        (Epilogue(statistics=True, merge=Merge(torch.ones(16), torch.ones(16), tracked=torch.tensor(0.0))), "tracked"),
    ],
)
def test_names_what_does_not_fit(epilogue, message):
    with pytest.raises(ValueError, match=message):
        prepare_conv(torch.zeros(1, 8, 8, 16), torch.zeros(16, 4, 4, 16), epilogue)


@given(
    kind=st.sampled_from(sorted(PREPARE)), images=st.integers(1, 3), groups=st.integers(1, 3), size=st.integers(1, 6),
    channels=st.integers(1, 24), backward=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def any_merge(kind, images, groups, size, channels, backward, dtype, seed):
    if not backward and images * size**2 * (4 if kind == "conv_transpose" else 1) < 2:
        return  # refused
    check_merge(kind, images, groups, size, channels, backward, dtype=dtype, seed=seed)


def test_generated():
    generated(any_merge, 4)


@pytest.mark.long
def test_generated_long():
    generated(any_merge, 2000)


def test_a_merge_is_of_its_direction():
    vector = torch.ones(16)
    with pytest.raises(TypeError, match="statistics takes a Merge"):
        Epilogue(statistics=True, merge=MergeGradients(vector, vector))
    with pytest.raises(TypeError, match="batch_norm_grad takes a MergeGradients"):
        Epilogue(saved=torch.zeros(1, 4, 4, 16), state=torch.zeros(4, 1, 16), merge=Merge(vector, vector))
