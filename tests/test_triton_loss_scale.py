"""float16's loss scale on the device, by the kernels and by their twins: what torch.amp.GradScaler does on the host."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import fenced, generated, only_interpreted

from kernels import reference

only_interpreted()

from kernels._triton import adam as triton_adam  # noqa: E402
from kernels._triton.head import prepare_head  # noqa: E402

LR, BETAS, EPS = 2e-4, (0.5, 0.999), 1e-8
BACKENDS = pytest.mark.parametrize("launch", [triton_adam, reference], ids=["triton", "reference"])


class Network:
    """One parameter of `n` elements at step 3: as `launch` updates it, and as torch.optim does."""

    def __init__(self, n, seed, launch):
        generator = torch.Generator().manual_seed(seed)
        held = [torch.randn(n, generator=generator).abs() for _ in range(3)]
        self.p, self.m, self.v = (fenced(t) for t in held)
        self.g, self.copy = fenced(torch.zeros(n)), fenced(self.p.half())
        self.table = launch.adam_table([self.p], [self.g], [self.m], [self.v], [self.copy])
        self.step = torch.tensor(3)
        self.twin = held[0].requires_grad_()
        self.optimizer = torch.optim.Adam([self.twin], lr=LR, betas=BETAS, eps=EPS)
        self.optimizer.state[self.twin] = {"step": torch.tensor(3.0), "exp_avg": held[1], "exp_avg_sq": held[2]}

    def check(self):
        state = self.optimizer.state[self.twin]
        assert self.step == state["step"]
        pairs = ((self.p, self.twin), (self.m, state["exp_avg"]), (self.v, state["exp_avg_sq"]))
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=5e-8)
        assert torch.equal(self.copy, self.p.half())


@BACKENDS
@pytest.mark.parametrize(
    ("scale", "good"),
    [
        pytest.param(1024.0, 0, id="too few good steps to grow"),
        pytest.param(65536.0, 1998, id="grows after the second step"),
        pytest.param(1000.0, 1998, id="no power of two"),
        pytest.param(2.0**127, 1999, id="would overflow: stays"),
    ],
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_two_networks_share_a_scale_as_two_optimisers_share_a_grad_scaler(launch, scale, good, bad):
    networks = [Network(n, seed, launch) for seed, n in enumerate((40, 2049))]
    loss_scale = torch.tensor([scale, good, 0.0])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))  # makes its tensors
    scaler._growth_tracker.fill_(good)
    noise = torch.Generator().manual_seed(7)
    for overflowing in ((), (), (0,), (), (1,), (0, 1), ()):
        for i, network in enumerate(networks):
            network.g.copy_(torch.randn(network.g.shape, generator=noise) * loss_scale[0] * 0.1)
            if i in overflowing:
                network.g[-1] = bad
            network.twin.grad = network.g.clone()
            last = i == len(networks) - 1
            launch.adam(network.table, network.step, LR, BETAS, EPS, loss_scale, move_scale=last)
            scaler.step(network.optimizer)
        scaler.update()
        assert loss_scale.tolist() == [scaler.get_scale(), scaler._get_growth_tracker(), 0], overflowing
        for network in networks:
            network.check()


@BACKENDS
def test_an_overflow_waits_for_the_scale_to_move(launch):
    network, loss_scale = Network(8, 0, launch), torch.tensor([8.0, 5.0, 0.0])
    network.g.fill_(math.inf)
    launch.adam(network.table, network.step, LR, BETAS, EPS, loss_scale, move_scale=False)
    assert loss_scale.tolist() == [8, 5, 1] and network.step == 3
    network.g.fill_(1)
    launch.adam(network.table, network.step, LR, BETAS, EPS, loss_scale)
    assert loss_scale.tolist() == [4, 0, 0] and network.step == 4


def test_the_flags_are_zero_again_after_an_overflow():
    network = Network(3000, 0, triton_adam)
    network.g[2999] = math.nan
    triton_adam.adam(network.table, network.step, LR, BETAS, EPS, torch.tensor([8.0, 0.0, 0.0]))
    assert network.table.flags.tolist() == [0, 0]


def test_the_scale_multiplies_the_head_s_gradient_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    y, weight = torch.randn(4, 2, 2, 16, generator=generator), torch.randn(1, 2, 2, 16, generator=generator)
    state = reference.merge_statistics(reference.statistics(y, 2), torch.ones(16), torch.zeros(16))
    loss_scale = torch.tensor([4096.0, 7.0, 0.0])
    for run in (lambda *a, **k: prepare_head(*a, **k).run(), reference.head):
        plain = run(y, weight, state, (True, False))
        scaled = run(y, weight, state, (True, False), scale=loss_scale)
        assert torch.equal(scaled[1], plain[1] * 4096)
        assert torch.equal(scaled[0], plain[0]) and torch.equal(scaled[2], plain[2])
    with pytest.raises(ValueError, match=r"scale is torch\.float64"):
        prepare_head(y, weight, state, (True, False), scale=loss_scale.double())


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4), where=st.integers(0, 10**6), seed=st.integers(0, 99),
    bad=st.sampled_from([math.inf, -math.inf, math.nan, 3.4e38, None]), scale=st.sampled_from([1.0, 1024.0, 3.0]),
)  # fmt: skip
def any_overflow(sizes, where, bad, scale, seed):
    """One bad element, wherever it is, and nothing is updated; without one everything is, as the twin does it."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[fenced(torch.randn(n, generator=generator).abs()) for n in sizes] for _ in range(4)]
    if bad is not None:
        tensor = lists[1][where % len(sizes)]
        tensor[where // len(sizes) % len(tensor)] = bad
    twins = [[t.clone() for t in part] for part in lists]
    none, results = [None] * len(sizes), []
    for launch, mine in ((triton_adam, lists), (reference, twins)):
        step, loss_scale = torch.tensor(3), torch.tensor([scale, 0.0, 0.0])
        before = [t.clone() for part in mine for t in part]
        launch.adam(launch.adam_table(*mine, none), step, LR, BETAS, EPS, loss_scale)
        if bad is not None and not math.isfinite(bad):
            after = [t for part in mine for t in part]
            assert all(torch.equal(a, b) or math.isnan(bad) for a, b in zip(after, before, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(mine[0], before[: len(sizes)], strict=True))
            assert step == 3 and loss_scale.tolist() == [scale / 2, 0, 0]
        else:
            assert step == 4 and loss_scale.tolist() == [scale, 1, 0]
        results.append([*mine[0], *mine[2], *mine[3]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_generated():
    generated(any_overflow, 8)


@pytest.mark.long
def test_generated_long():
    generated(any_overflow, 2000)


def test_adam_names_a_loss_scale_that_does_not_fit():
    network = Network(8, 0, triton_adam)
    with pytest.raises(ValueError, match=r"loss_scale is torch.float32 of shape \(2,\)"):
        triton_adam.adam(network.table, network.step, LR, BETAS, EPS, torch.ones(2))
