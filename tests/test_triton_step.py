"""Adam and the gather. Against their twins, and against torch itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, fenced, generated, only_interpreted, run_guarded

from kernels import reference

only_interpreted()

from kernels._triton.adam import adam, adam_table  # noqa: E402
from kernels._triton.gather import prepare_gather  # noqa: E402

LR, BETAS, EPS = 2e-4, (0.5, 0.999), 1e-8


def noise(*shape, dtype=torch.float32, seed=0):
    return fenced(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


# Adam


def make_adam(shapes, seed=0, copies=True):
    """Parameters amid NaN, gradients, zero moments and 16-bit copies, convolutions in channels_last memory."""

    def place(t):
        return fenced(t.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2) if t.ndim == 4 else fenced(t)

    params = [place(noise(*shape, seed=seed + i)) for i, shape in enumerate(shapes)]
    grads = [place(noise(*shape, seed=seed + 50 + i)) for i, shape in enumerate(shapes)]
    moments = [[place(torch.zeros(shape)) for shape in shapes] for _ in range(2)]
    halves = [torch.full_like(p, math.nan, dtype=torch.float16) if copies and p.ndim == 4 else None for p in params]
    return params, grads, *moments, halves


def check_adam(shapes, steps=3, seed=0):
    params, grads, m, v, copies = make_adam(shapes, seed)
    table, step = adam_table(params, grads, m, v, copies), torch.tensor(0)
    torch_params = [p.double().clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adam(torch_params, lr=LR, betas=BETAS, eps=EPS)
    copied = [[t.clone() for t in tensors] for tensors in (params, m, v)]
    twin = reference.adam_table(copied[0], grads, *copied[1:], [None] * len(params))
    for t in range(1, steps + 1):
        for i, g in enumerate(grads):
            g.copy_(noise(*g.shape, seed=seed + 100 * t + i))
            torch_params[i].grad = g.double()
        adam(table, step, LR, BETAS, EPS)
        reference.adam(twin, torch.tensor(t - 1), LR, BETAS, EPS)
        optimizer.step()
    assert step == steps and not table.flags.any()
    twins = list(zip(*copied, strict=True))
    for i, p in enumerate(params):
        state = optimizer.state[torch_params[i]]
        for ours, twin, exact in zip(
            (p, m[i], v[i]), twins[i], (torch_params[i], state["exp_avg"], state["exp_avg_sq"]), strict=True
        ):
            assert_accurate(ours, twin, exact.detach(), f"tensor {i}")
        if copies[i] is not None:
            assert torch.equal(copies[i], p.half())


def test_adam_of_many_tensors_is_torchs():
    check_adam([(8, 3, 4, 4), (8,), (1,), (16, 33, 4, 4), (2049,)])


def test_adam_leaves_the_neighbours_alone():
    buffers = [torch.full((133,), 7.0) for _ in range(4)] + [torch.full((133,), 7.0, dtype=torch.float16)]
    views = [buffer[64:69] for buffer in buffers]
    views[1].fill_(3)
    adam(adam_table(*[[view] for view in views]), torch.tensor(0), 0.5, BETAS, EPS)
    for buffer, view in zip(buffers, views, strict=True):
        assert (buffer[:64] == 7).all() and (buffer[69:] == 7).all() and (view != 7).all()


def test_adam_counts_on_the_device_from_a_resumed_step():
    params, grads, m, v, copies = make_adam([(7,)])
    m[0].fill_(0.5), v[0].fill_(0.25)
    expected = reference.adam_update(*(t[0].double() for t in (params, grads, m, v)), 1001, LR, BETAS, EPS)
    step = torch.tensor(1000)
    adam(adam_table(params, grads, m, v, copies), step, LR, BETAS, EPS)
    assert step == 1001
    torch.testing.assert_close(params[0].double(), expected[0], rtol=1e-6, atol=1e-9)


def test_adams_first_step_is_the_rate_times_the_sign():
    """At t = 1 the bias corrections cancel 1 − β exactly; in fp32 they would be wrong in the fifth digit."""
    params, grads, m, v, copies = make_adam([(64,)])
    before = params[0].double().clone()
    adam(adam_table(params, grads, m, v, copies), torch.tensor(0), 1.0, BETAS, 1e-12)
    torch.testing.assert_close(before - params[0].double(), grads[0].double().sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.5, 0.0)])
def test_adam_without_a_memory(betas):
    params, grads, m, v, copies = make_adam([(65,)])
    expected = [t[0].double().clone() for t in (params, grads, m, v)]
    adam(adam_table(params, grads, m, v, copies), torch.tensor(0), LR, betas, EPS)
    torch.testing.assert_close(params[0].double(), reference.adam_update(*expected, 1, LR, betas, EPS)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a[1].pop(), "grads has 1 tensors: expected 2"),
        (lambda a: a[1].__setitem__(0, a[1][0].contiguous()), r"grads\[0\] has shape"),
        (lambda a: a[2].__setitem__(1, a[2][1].double()), r"exp_avgs\[1\] is torch.float64"),
        (lambda a: a[4].__setitem__(0, a[4][0].float()), "copies are of"),
    ],
)
def test_adam_names_what_does_not_fit(change, message):
    arguments = [list(part) for part in make_adam([(4, 3, 4, 4), (5,)])]
    change(arguments)
    with pytest.raises(ValueError, match=message):
        adam_table(*arguments)


def test_adam_refuses_a_parameter_with_gaps():
    gappy = torch.zeros(4, 8)[:, :5]
    with pytest.raises(ValueError, match="dense"):
        adam_table([gappy], [gappy], [gappy], [gappy], [None])


# The gather


def check_gather(count, size, into, batch, cursor, flipped, dtype, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = fenced(torch.randint(0, 256, (count, *size, into), generator=generator, dtype=torch.uint8))
    permutation = fenced(torch.randperm(count, generator=generator))
    flip = fenced(torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8)) if flipped else None
    at = torch.tensor(cursor)
    ticket = torch.zeros(1, dtype=torch.int32)
    job = prepare_gather(rows, permutation, at, batch, flip, dtype, channels, ticket)
    ours = run_guarded(job, *[t for t in (rows, permutation, at, flip, ticket) if t is not None])
    assert len(job.launches) == 1 and at == cursor + batch and ticket == 0
    expected = reference.gather(rows, permutation, torch.tensor(cursor), batch, flip, torch.float32, channels)
    assert ours.dtype == dtype and ours.shape == expected.shape
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("flipped", [False, True], ids=["as it is", "mirrored"])
@pytest.mark.parametrize(
    "count, size, into, batch, cursor, channels",
    [
        pytest.param(10, (8, 8), 3, 4, 0, None, id="RGB"),
        pytest.param(10, (8, 8), 3, 4, 3, 4, id="RGB padded to four channels"),
        pytest.param(7, (7, 5), 1, 3, 5, None, id="grey, odd size, around the end"),
        pytest.param(3, (40, 40), 3, 1, 2, None, id="several programs an image"),
    ],
)
def test_gather(count, size, into, batch, cursor, channels, flipped):
    check_gather(count, size, into, batch, cursor, flipped, torch.float16, channels)


def test_gather_reaches_both_ends_of_the_range():
    rows = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    out = prepare_gather(rows, torch.tensor([1, 0]), torch.tensor(0), 2, dtype=torch.float32).run()
    assert out.flatten().tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": torch.zeros(2, 4, 4, 3)}, "rows is torch.float32"),
        ({"batch": 0}, "batch is 0"),
        ({"channels": 2}, "channels 2"),
        ({"permutation": torch.zeros(2)}, "permutation is torch.float32"),
        ({"flip": torch.zeros(3, dtype=torch.uint8)}, "flip has shape"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
    ],
)
def test_gather_names_what_does_not_fit(arguments, message):
    fine = {
        "rows": torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        "permutation": torch.arange(2),
        "cursor": torch.tensor(0),
    }
    with pytest.raises(ValueError, match=message):
        prepare_gather(**({"batch": 2} | fine | arguments))


# Generated


@given(sizes=st.lists(st.integers(1, 4100), min_size=1, max_size=5), seed=st.integers(0, 99))
def any_adam(sizes, seed):
    check_adam([(n,) for n in sizes], 2, seed)


@given(
    count=st.integers(1, 12), height=st.integers(1, 20), width=st.integers(1, 20), into=st.integers(1, 4),
    extra=st.integers(0, 2), batch=st.integers(1, 6), cursor=st.integers(0, 1000), flipped=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def any_gather(count, height, width, into, extra, batch, cursor, flipped, dtype, seed):
    check_gather(count, (height, width), into, batch, cursor, flipped, dtype, into + extra, seed)


OPS = {"adam": any_adam, "gather": any_gather}


@pytest.mark.parametrize("op", OPS)
def test_generated(op):
    generated(OPS[op], 8)


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_generated_long(op):
    generated(OPS[op], 2000)
