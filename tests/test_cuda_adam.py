"""The extension's Adam, its own source run on a CPU, against its twin, torch.optim.Adam and torch.amp.GradScaler."""

import math

import pytest
import torch
from cuda_host import in_both_orders, on_host
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, fenced, generated

from kernels import reference
from kernels._cuda.adam import BLOCK, adam, adam_table

LR, BETAS, EPS = 2e-4, (0.5, 0.999), 1e-8


@pytest.fixture(autouse=True)
def host():
    with on_host():
        yield


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_adam(shapes, seed=0, copy_dtype=torch.bfloat16):
    """Parameters amid NaN, gradients, zero moments and 16-bit copies, convolutions in channels_last memory."""

    def place(t):
        return fenced(t.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2) if t.ndim == 4 else fenced(t)

    params = [place(noise(*shape, seed=seed + i)) for i, shape in enumerate(shapes)]
    grads = [place(noise(*shape, seed=seed + 50 + i)) for i, shape in enumerate(shapes)]
    moments = [[place(torch.zeros(shape)) for shape in shapes] for _ in range(2)]
    copies = [place(torch.full(s, math.nan, dtype=copy_dtype)) if len(s) == 4 else None for s in shapes]
    return params, grads, *moments, copies


def check_adam(shapes, steps=3, seed=0, copy_dtype=torch.bfloat16, step=0):
    params, grads, m, v, copies = make_adam(shapes, seed, copy_dtype)
    table, step = adam_table(params, grads, m, v, copies), torch.as_tensor(step)
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
    for i, (p, *twins) in enumerate(zip(params, *copied, strict=True)):
        state = optimizer.state[torch_params[i]]
        exact = torch_params[i], state["exp_avg"], state["exp_avg_sq"]
        for ours, twin, oracle in zip((p, m[i], v[i]), twins, exact, strict=True):
            assert_accurate(ours, twin, oracle.detach(), f"tensor {i}")
        assert copies[i] is None or torch.equal(copies[i], p.to(copy_dtype))


@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_tensors_as_torch_updates_them(copy_dtype):
    check_adam([(8, 3, 4, 4), (8,), (1,), (16, 9, 4, 4), (BLOCK + 1,), (3, 5, 4, 4)], copy_dtype=copy_dtype)


def test_a_step_counted_in_float():
    check_adam([(33,)], step=0.0)


def test_neighbours_are_left_alone():
    buffers = [torch.full((133,), 7.0) for _ in range(4)] + [torch.full((133,), 7.0, dtype=torch.float16)]
    views = [buffer[64:69] for buffer in buffers]
    views[1].fill_(3)
    adam(adam_table(*[[view] for view in views]), torch.tensor(0), 0.5, BETAS, EPS)
    for buffer, view in zip(buffers, views, strict=True):
        assert (buffer[:64] == 7).all() and (buffer[69:] == 7).all() and (view != 7).all()


def test_a_resumed_step():
    params, grads, m, v, copies = make_adam([(7,)])
    m[0].fill_(0.5), v[0].fill_(0.25)
    expected = reference.adam_update(*(t[0].double() for t in (params, grads, m, v)), 100001, LR, BETAS, EPS)
    step = torch.tensor(100000)
    adam(adam_table(params, grads, m, v, copies), step, LR, BETAS, EPS)
    assert step == 100001
    torch.testing.assert_close(params[0].double(), expected[0], rtol=1e-6, atol=0)


def test_the_first_step_is_the_rate_times_the_sign():
    """The bias corrections in full: 1 − 0.999 as a difference of two floats has four digits."""
    params, grads, m, v, copies = make_adam([(64,)])
    before = params[0].double()
    adam(adam_table(params, grads, m, v, copies), torch.tensor(0), 1.0, BETAS, 1e-12)
    torch.testing.assert_close(before - params[0].double(), grads[0].double().sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.5, 0.0)])
def test_without_a_memory(betas):
    params, grads, m, v, copies = make_adam([(65,)])
    expected = [t[0].double().clone() for t in (params, grads, m, v)]
    adam(adam_table(params, grads, m, v, copies), torch.tensor(0), LR, betas, EPS)
    torch.testing.assert_close(params[0].double(), reference.adam_update(*expected, 1, LR, betas, EPS)[0])


def test_the_order_of_blocks_changes_no_bit():
    def run():
        params, *rest = make_adam([(3 * BLOCK + 5,), (7,)])
        step, table = torch.tensor(0), adam_table(params, *rest)
        for _ in range(2):
            adam(table, step, LR, BETAS, EPS)
        return *params, step, table.flags

    assert all(torch.equal(a, b) for a, b in zip(*in_both_orders(run), strict=True))


@pytest.mark.parametrize(
    "scale, good",
    [
        pytest.param(1024.0, 0, id="too few good steps to grow"),
        pytest.param(65536.0, 1998, id="grows after the second step"),
        pytest.param(2.0**127, 1999, id="would overflow: stays"),
    ],
)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_two_networks_share_a_scale_as_their_twins_do(scale, good, bad):
    """The twin is held to torch.amp.GradScaler elsewhere."""
    sizes = (40, BLOCK + 1)
    made = [make_adam([(n,)], seed) for seed, n in enumerate(sizes)]
    copied = [[[t if t is None else t.clone() for t in part] for part in parts] for parts in made]
    loss_scale, steps = torch.tensor([scale, good, 0.0]), [torch.tensor(3), torch.tensor(3)]
    twin_scale, twin_steps = loss_scale.clone(), [t.clone() for t in steps]
    tables = [adam_table(*parts) for parts in made]
    for number, overflowing in enumerate(((), (), (0,), (), (1,), (0, 1), ())):
        for i in range(2):
            g = noise(sizes[i], seed=number) * loss_scale[0] * 0.1
            if i in overflowing:
                g[-1] = bad
            made[i][1][0].copy_(g), copied[i][1][0].copy_(g)
            adam(tables[i], steps[i], LR, BETAS, EPS, loss_scale, move_scale=i == 1)
            twin = reference.adam_table(*copied[i])
            reference.adam(twin, twin_steps[i], LR, BETAS, EPS, twin_scale, move_scale=i == 1)
        assert torch.equal(loss_scale, twin_scale) and steps == twin_steps
        assert not any(table.flags.any() for table in tables)
    for ours, twins in zip(made, copied, strict=True):
        for part in (0, 2, 3):
            torch.testing.assert_close(ours[part][0], twins[part][0], rtol=2e-6, atol=5e-8)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a[1].pop(), "grads has 1 tensors: expected 2"),
        (lambda a: a[0].__setitem__(0, a[0][0].double()), r"params\[0\] is torch.float64 on cpu"),
        (lambda a: a[1].__setitem__(0, a[1][0].contiguous()), r"grads\[0\] has shape .* and strides"),
        (lambda a: a[4].__setitem__(1, torch.zeros(5, dtype=torch.float16)), "copies are of"),
        (lambda a: a[2].__setitem__(1, torch.zeros(9)[1:6]), r"exp_avgs\[1\] starts at address"),
    ],
)
def test_errors_name_the_tensor(change, message):
    arguments = [list(part) for part in make_adam([(4, 3, 4, 4), (5,)])]
    change(arguments)
    with pytest.raises(ValueError, match=message):
        adam_table(*arguments)


def test_errors_name_the_argument():
    gappy = torch.zeros(8)[::2]
    with pytest.raises(ValueError, match=r"params\[0\] has strides \(2,\): it must be dense"):
        adam_table([gappy], [gappy], [gappy], [gappy], [None])
    with pytest.raises(ValueError, match="params is empty"):
        adam_table([], [], [], [], [])
    table = adam_table(*make_adam([(5,)]))
    with pytest.raises(ValueError, match=r"step is torch\.int32"):
        adam(table, torch.tensor(0, dtype=torch.int32), LR)
    with pytest.raises(ValueError, match="step is on meta: expected cpu"):
        adam(table, torch.tensor(0, device="meta"), LR)
    with pytest.raises(ValueError, match="betas is"):
        adam(table, torch.tensor(0), LR, (0.5, 1.0))
    with pytest.raises(ValueError, match=r"loss_scale is torch.float32 of shape \(2,\)"):
        adam(table, torch.tensor(0), LR, loss_scale=torch.ones(2))


@given(sizes=st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=4), seed=st.integers(0, 999))
def any_adam(sizes, seed):
    check_adam([(n,) for n in sizes], 2, seed)


def test_generated():
    generated(any_adam, 10)


@pytest.mark.long
def test_generated_long():
    generated(any_adam, 2000)
