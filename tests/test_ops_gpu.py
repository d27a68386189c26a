"""The ops inside a CUDA graph and under torch.compile: only on a GPU, and not yet run on one."""

import functools

import pytest
import torch

import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 5
FUSED = ("library", "triton", "cuda")


def skip_where_it_cannot_run(backend):
    if reason := kernels.dispatch.why_not(backend, torch.device("cuda"), torch.float32):
        pytest.skip(reason)


def captured(run):
    """A CUDA graph of `run`, which is run once before, as kernels compile at their first call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def layer(kind, backend, compiled=False):
    """A convolution of either kind with batch norm, forward and backward, as a function of its input."""
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(16, 16, 4, 4, generator=g) * 0.1).cuda().contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    norm = [torch.ones(16, device="cuda", requires_grad=True), torch.zeros(16, device="cuda", requires_grad=True)]
    running = [torch.zeros(16, device="cuda"), torch.ones(16, device="cuda")]
    op = functools.partial(getattr(kernels, f"{kind}_bn_act"), groups=2, backend=backend)
    if compiled:
        op = torch.compile(op, fullgraph=True)

    def run(x):
        y = op(x, weight, *norm, *running)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (weight, *norm))

    return run, running


@pytest.fixture
def x():
    images = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return images.cuda().contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_alike(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm().clamp(min=1e-3)


@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
@pytest.mark.parametrize("backend", FUSED)
def test_a_layer_in_a_graph_is_the_layer(backend, kind, x):
    skip_where_it_cannot_run(backend)
    run, running = layer(kind, backend)
    graph, result = captured(lambda: run(x))
    x.copy_(x.flip(0) * 2)
    for tensor, start in zip(running, (0.0, 1.0), strict=True):
        tensor.fill_(start)
    graph.replay()
    plain, moved = layer(kind, "eager")
    assert_alike(result, plain(x))
    assert_alike(running, moved)


@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_a_layer_compiles_without_graph_breaks(backend, kind, x):
    skip_where_it_cannot_run(backend)
    run, _ = layer(kind, backend, compiled=True)
    plain, _ = layer(kind, "eager")
    assert_alike(run(x), plain(x))


class Step:
    """Gather, a linear discriminator of its images, loss, Adam: a step with nothing but the three ops around it."""

    def __init__(self, backend, device, scaled):
        g = torch.Generator().manual_seed(0)
        rows = torch.randint(0, 256, (10, 6, 6, 3), generator=g, dtype=torch.uint8)
        self.backend, self.rows = backend, rows.to(device)
        self.order = torch.randperm(10, generator=g).to(device)
        self.flip = torch.randint(0, 2, (10,), generator=g, dtype=torch.uint8).to(device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.p = (torch.randn(6 * 6 * 3, generator=g) * 0.1).to(device).requires_grad_()
        self.g, self.m, self.v = (torch.zeros_like(self.p, requires_grad=False) for _ in range(3))
        self.loss_scale = kernels.new_loss_scale(device, first=8.0) if scaled else None
        self.losses = torch.zeros(2, device=device)

    def moved(self):
        moved = [self.p.detach(), self.m, self.v, self.cursor, self.step, self.losses]
        return moved if self.loss_scale is None else [*moved, self.loss_scale]

    def run(self):
        images = kernels.gather_images(self.rows, self.order, self.cursor, 4, flip=self.flip, backend=self.backend)
        found = kernels.gan_loss(images.flatten(1) @ self.p, (True, False), backend=self.backend)
        scale = 1.0 if self.loss_scale is None else self.loss_scale[0]
        (gradient,) = torch.autograd.grad((found.losses * scale).sum(), self.p)
        self.g.copy_(gradient)
        self.losses.copy_(found.losses.detach())
        kernels.adam_step(
            [self.p], [self.g], [self.m], [self.v], self.step, lr=1e-2, loss_scale=self.loss_scale,
            backend=self.backend,
        )  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_a_replayed_graph_is_the_same_steps_run_one_by_one(backend, scaled):
    skip_where_it_cannot_run(backend)
    plain, ours = Step("eager", "cuda", scaled), Step(backend, "cuda", scaled)
    initial = [t.clone() for t in ours.moved()]
    graph, _ = captured(ours.run)
    for tensor, value in zip(ours.moved(), initial, strict=True):
        with torch.no_grad():
            tensor.copy_(value)
    for _ in range(STEPS):
        plain.run()
        graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(ours.moved(), plain.moved(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert ours.step == STEPS and ours.cursor == 4 * STEPS


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_same_bits_run_after_run(backend):
    skip_where_it_cannot_run(backend)
    logits = torch.randn(2 * 1000, device="cuda")
    first = kernels.gan_loss(logits, (True, False), backend=backend)
    for _ in range(100):
        again = kernels.gan_loss(logits, (True, False), backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
