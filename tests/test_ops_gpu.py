"""The ops of a step inside a CUDA graph, replayed: only on a GPU, and not yet run on one."""

import pytest
import torch

import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 5


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
    if reason := kernels.dispatch.why_not(backend, torch.device("cuda"), torch.float32):
        pytest.skip(reason)
    plain, captured = Step("eager", "cuda", scaled), Step(backend, "cuda", scaled)
    initial = [t.clone() for t in captured.moved()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run()
    for tensor, value in zip(captured.moved(), initial, strict=True):
        tensor.copy_(value)
    for _ in range(STEPS):
        plain.run()
        graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured.moved(), plain.moved(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert captured.step == STEPS and captured.cursor == 4 * STEPS


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_same_bits_run_after_run(backend):
    if reason := kernels.dispatch.why_not(backend, torch.device("cuda"), torch.float32):
        pytest.skip(reason)
    logits = torch.randn(2 * 1000, device="cuda")
    first = kernels.gan_loss(logits, (True, False), backend=backend)
    for _ in range(100):
        again = kernels.gan_loss(logits, (True, False), backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
