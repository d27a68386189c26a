"""The fused step equals the reference step: in fp64 to rounding, in fp32 step by step, in bf16 by the 2× rule."""

import copy

import pytest
import torch
from torch import Tensor

from dcgan.arch import Arch
from dcgan.fused import FusedStep
from dcgan.model import Discriminator, Generator
from dcgan.step import ReferenceStep, adam
from kernels import tuning
from kernels.cpu import elementwise, products, winograd
from kernels.cpu.winograd import WinogradProduct
from kernels.geometry import Layer
from kernels.launchers import launchers
from kernels.pool import Pool

STEPS = 20
CASES = {  # architecture and batch
    "start 4, RGB": (Arch(image_size=32, nz=10, ngf=16, ndf=16), 3),
    "start 4, grey, unaligned": (Arch(image_size=16, channels=1, nz=5, ngf=9, ndf=7), 4),
    "start 7, grey": (Arch(image_size=28, channels=1, nz=6, ngf=8, ndf=8), 5),  # 7×7 maps: never Winograd's
    "start 8, RGBA": (Arch(image_size=32, channels=4, nz=8, ngf=8, ndf=8, dense=True), 3),
    "64×64": (Arch(nz=7, ngf=4, ndf=4), 3),
    "batch 1": (Arch(image_size=16, nz=5, ngf=16, ndf=16), 1),
    "no batch norm before the head": (Arch(image_size=16, nz=5, ngf=6, ndf=6, dense=True), 3),
}
UPDATES = ("alternating", "simultaneous")


@pytest.fixture(params=["winograd", "library", "launchers"])
def way(request, monkeypatch) -> str:
    """How the networks run: on a CPU's products, Winograd's wherever the geometry allows or the library's, wide maps in
    several parts; or, as on a GPU, over the kernels' launchers, by their twins."""
    monkeypatch.setattr(products, "WINOGRAD_CHANNELS", 1 if request.param == "winograd" else 1 << 60)
    monkeypatch.setattr(products, "PART_BYTES", 1 << 14)
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 1 << 16)
    return request.param


def options(way: str) -> dict:
    return {"launch": launchers("eager")} if way == "launchers" else {}


class Pair:
    """The reference's networks and step, and the fused ones, from the same seed. `grads_d` are D's at its update.

    After an alternating step the reference's `.grad` of D hold G's loss as well, which nobody uses.
    """

    def __init__(self, arch: Arch, update: str = "alternating", dtype: torch.dtype = torch.float64, **fused):
        self.arch, self.dtype = arch, dtype
        self.models, self.steps = [], []
        for kind, options in ((ReferenceStep, {}), (FusedStep, fused)):
            seed = torch.Generator().manual_seed(0)
            g, d = Generator(arch, seed).to(dtype), Discriminator(arch, seed).to(dtype)
            fast = kind is FusedStep
            self.models.append((g, d))
            self.steps.append(kind(g, d, adam(g, fused=fast), adam(d, fused=fast), update, **options))
        self.reference, self.fused = self.steps
        self.reference.optimizer_d.register_step_pre_hook(self._keep)
        self.data = torch.Generator().manual_seed(1)

    def _keep(self, *_) -> None:
        self.grads_d = [parameter.grad.clone() for parameter in self.models[0][1].parameters()]

    def batch(self, images: int) -> tuple[Tensor, Tensor]:
        arch = self.arch
        shape = (images, arch.channels, arch.image_size, arch.image_size)
        real = torch.rand(shape, generator=self.data, dtype=self.dtype) * 2 - 1
        return real, torch.randn(images, arch.nz, generator=self.data, dtype=self.dtype)

    def synchronise(self) -> None:
        """Give the fused side the reference's weights, statistics and optimiser states."""
        for theirs, ours in zip(*self.models, strict=True):
            ours.load_state_dict(theirs.state_dict())
        for name in ("optimizer_g", "optimizer_d"):
            theirs, ours = (getattr(step, name).state_dict() for step in self.steps)
            getattr(self.fused, name).load_state_dict(copy.deepcopy({**ours, "state": theirs["state"]}))

    def gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of every parameter by name after a step: the reference's and the fused step's (None before it ran)."""
        (g, d), ours = self.models
        names = [f"{network}.{name}" for network, m in (("G", g), ("D", d)) for name, _ in m.named_parameters()]
        reference = [parameter.grad for parameter in g.parameters()] + self.grads_d
        return dict(zip(names, reference, strict=True)), dict(
            zip(names, [parameter.grad for m in ours for parameter in m.parameters()], strict=True)
        )


def together(gradients: dict[str, Tensor], network: str) -> Tensor:
    return torch.cat([gradient.flatten() for name, gradient in gradients.items() if name.startswith(network)])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_over_free_steps_in_fp64(case, update, way):
    arch, images = CASES[case]
    pair = Pair(arch, update, **options(way))
    found = any(isinstance(getattr(s, "product", None), WinogradProduct) for s in pair.fused.discriminator.stages)
    assert found == (way == "winograd" and arch.start != 7 and arch.doublings > 1)
    for i in range(STEPS):
        real, z = pair.batch(images)
        expected, got = pair.reference(real, z), pair.fused(real, z)
        torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=1e-10)
        torch.testing.assert_close(got[2:], expected[2:], rtol=0, atol=1e-6, equal_nan=True)  # fp32 on both sides
        if i == 0:
            reference, fused = pair.gradients()
            for name in reference:
                torch.testing.assert_close(
                    fused[name], reference[name], rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
                )
    for theirs, ours in zip(*pair.models, strict=True):
        for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_batch_norm_in_every_load_or_in_none(deferred, update, monkeypatch):
    """A table may say either of any layer."""
    monkeypatch.setattr(tuning, "deferred", lambda *_: (deferred, "for the test"))
    test_equals_the_reference_over_free_steps_in_fp64("start 4, RGB", update, "launchers")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("case", ["start 4, RGB", "64×64"])
def test_equals_the_reference_step_by_step_in_fp32(case, update, way):
    """From the second step on: Adam's first moves each weight by the learning rate along its gradient's sign, which is
    anybody's guess where the gradient is 0 to rounding; G's loss, taken after it, then differs by up to 1e-4."""
    arch, images = CASES[case]
    pair = Pair(arch, update, torch.float32, **options(way))
    pair.reference(*pair.batch(images))
    for _ in range(STEPS):
        pair.synchronise()
        real, z = pair.batch(images)
        torch.testing.assert_close(pair.fused(real, z)[:2], pair.reference(real, z)[:2], rtol=0, atol=1e-5)


def test_a_smaller_batch_and_back(way):
    """The last batch of an epoch is smaller and uses the front of the same buffers."""
    pair = Pair(CASES["start 4, RGB"][0], **options(way))
    for images in (4, 4, 1, 3, 4, 6, 4):
        real, z = pair.batch(images)
        torch.testing.assert_close(pair.fused(real, z)[:2], pair.reference(real, z)[:2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
def test_bf16_by_the_2x_rule(update, way):
    """The error of losses and gradients against fp64 is at most twice that of the reference under bf16 autocast.

    Averaged over 8 batches from one state, since a loss's error is a single draw of rounding. The slack is the
    project's 2 ulp, of bf16 at 1: 2 · 2⁻⁸.
    """
    arch, images = Arch(image_size=32, nz=16, ngf=32, ndf=32), 8
    exact, low = Pair(arch, update), Pair(arch, update, torch.float32, precision="bf16", **options(way))
    low.reference.precision = "bf16"
    errors = torch.zeros(2, 4, dtype=torch.float64)  # reference, fused × D's loss, G's loss, D's and G's gradient
    for _ in range(8):
        for source, copies in zip(exact.models[0], zip(*low.models, strict=True), strict=True):
            for model in copies:
                model.load_state_dict(source.state_dict())
        real, z = exact.batch(images)
        losses, truth = exact.reference(real, z)[:2], exact.gradients()[0]
        found = [step(real.float(), z.float())[:2] for step in low.steps]
        for row, got, gradients in zip(errors, found, low.gradients(), strict=True):
            row[:2] += (got - losses).abs()
            for column, network in ((2, "D"), (3, "G")):
                expected = together(truth, network)
                row[column] += (together(gradients, network) - expected).norm() / expected.norm()
    reference, fused = errors / 8
    assert (fused <= 2 * reference + 2 * 2**-8).all(), (reference, fused)


@pytest.mark.parametrize(
    ("size", "low", "high", "expected"),
    [
        (64, 64, 3, "ImageProduct"),
        (16, 256, 128, "WinogradProduct"),
        (32, 128, 64, "LibraryProduct"),  # too thin to pay
        (14, 256, 128, "LibraryProduct"),  # 7×7 does not split into tiles
    ],
)
def test_the_way_to_compute_a_layer(size, low, high, expected):
    layer = Layer("D", "conv", high, low, size, 4, 2, 1, True, "leaky_relu")
    assert type(products.choose(layer, torch.float32, Pool())).__name__ == expected


def test_gradient_at_exactly_zero():
    """ReLU passes nothing there and LeakyReLU its slope, as in PyTorch."""
    zero, grad = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for slope, reference in ((0.0, torch.relu), (0.2, lambda x: torch.nn.functional.leaky_relu(x, 0.2))):
        x, y, found = zero.clone().requires_grad_(), torch.empty_like(zero), torch.empty_like(zero)
        reference(x).backward(grad)
        elementwise.leaky_relu(zero, slope, y)
        elementwise.leaky_relu_backward(grad, y, slope, found)
        assert found.item() == x.grad.item() == pytest.approx(slope)


def test_the_launchers_take_over_what_changes_outside():
    """Weights changed in place, other tensors in their place, an optimiser's state loaded, a step left out."""
    pair = Pair(CASES["start 4, RGB"][0], **options("launchers"))
    changes = [
        lambda g, step: None,
        lambda g, step: g.main[0].weight.data.mul_(1.5),
        lambda g, step: [setattr(p, "data", p.data.clone()) for p in g.parameters()],
        lambda g, step: step.optimizer_g.load_state_dict(copy.deepcopy(step.optimizer_g.state_dict())),
        lambda g, step: [entry["exp_avg"].zero_() for entry in step.optimizer_g.state.values()],
        lambda g, step: step.optimizer_g.state.clear(),
        lambda g, step: None,
    ]
    for change in changes:
        for (g, _), step in zip(pair.models, pair.steps, strict=True):
            change(g, step)
        real, z = pair.batch(3)
        torch.testing.assert_close(pair.fused(real, z)[:2], pair.reference(real, z)[:2], rtol=0, atol=1e-10)
    for theirs, ours in zip(pair.models[0][0].parameters(), pair.models[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_packed_weights_follow_the_parameters():
    pair = Pair(CASES["start 4, RGB"][0], dtype=torch.float32, precision="bf16", **options("launchers"))
    (g, _), stack = pair.models[1], pair.fused.generator
    assert not pair.fused.refresh()
    with torch.no_grad():
        g.main[3].weight.add_(1)
    pair.fused.refresh()
    assert torch.equal(stack.stages[1].weight, g.main[3].weight.detach().permute(0, 2, 3, 1).bfloat16())
    g.main[3].weight.data = torch.ones_like(g.main[3].weight)
    assert pair.fused.refresh() and (stack.stages[1].weight == 1).all()
    assert stack.stages[1].grad.data_ptr() == g.main[3].weight.grad.data_ptr()
    assert not pair.fused.refresh()
    pair.fused.optimizer_d.param_groups[0]["lr"] = 1e-3
    assert pair.fused.refresh() and not pair.fused.refresh()
    g.main[1].running_mean = torch.zeros_like(g.main[1].running_mean)
    assert pair.fused.refresh() and not pair.fused.refresh()


def test_the_reference_step_says_where_a_graph_of_it_is_void():
    pair = Pair(CASES["batch 1"][0], dtype=torch.float32)
    step = pair.reference
    assert not step.refresh()
    step(*pair.batch(3))
    assert not step.refresh() and not step.refresh()  # the optimisers' states are new, and nothing has moved
    step.optimizer_g.load_state_dict(copy.deepcopy(step.optimizer_g.state_dict()))
    assert step.refresh() and not step.refresh()
    pair.models[0][1].main[0].weight.data = pair.models[0][1].main[0].weight.data.clone()
    assert step.refresh() and not step.refresh()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.param_groups[0].update(weight_decay=0.1), "weight_decay=0.1"),
        (lambda o: o.param_groups[0].update(amsgrad=True), "amsgrad=True"),
        (lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}), "2 groups"),
    ],
)
def test_refuses_an_optimiser_that_the_update_cannot_be(change, said):
    models = Generator(CASES["batch 1"][0]), Discriminator(CASES["batch 1"][0])
    optimizers = [adam(model) for model in models]
    change(optimizers[1])
    with pytest.raises(ValueError, match=said):
        FusedStep(*models, *optimizers, **options("launchers"))


REFUSED = [
    ({"precision": "fp16"}, "'fp16'.*fp32, bf16"),
    ({"precision": "tf32"}, "'tf32'.*cpu"),
    ({"update": "both"}, "'both'.*simultaneous"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_refuses_what_it_does_not_serve(options, said):
    models = Generator(CASES["batch 1"][0]), Discriminator(CASES["batch 1"][0])
    with pytest.raises(ValueError, match=said):
        FusedStep(*models, *(adam(model, fused=True) for model in models), **options)


@pytest.mark.parametrize("kind", [ReferenceStep, FusedStep])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_nothing(kind, precision):
    """Its cache of cast weights would outlive D's update, and G would learn from the D of before."""
    arch = CASES["start 4, RGB"][0]

    def losses(outside):
        seed = torch.Generator().manual_seed(0)
        g, d = Generator(arch, seed), Discriminator(arch, seed)
        step = kind(g, d, adam(g, fused=True), adam(d, fused=True), precision=precision)
        random = torch.Generator().manual_seed(1)
        with outside:
            return torch.stack(
                [
                    step(
                        torch.rand(8, 3, 32, 32, generator=random) * 2 - 1, torch.randn(8, arch.nz, generator=random)
                    ).float()
                    for _ in range(3)
                ]
            )

    bare = losses(torch.autocast("cpu", enabled=False))
    assert torch.equal(losses(torch.autocast("cpu", torch.bfloat16)), bare)


def layer_of(size: int, low: int, high: int) -> Layer:
    return Layer("D", "conv", high, low, size, 4, 2, 1, True, "leaky_relu")


def test_a_library_result_is_in_a_buffer_that_stays():
    product = products.choose(layer_of(16, 32, 16), torch.float32, Pool())
    weight = product.pack(torch.randn(32, 16, 4, 4))
    images = torch.randn(5, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    first = product.to_low(product.high(images), weight).data_ptr()
    assert product.to_low(product.high(images[:3]), weight).data_ptr() == first
    first = product.to_high(torch.randn(5, 32, 8, 8), weight).data_ptr()
    assert product.to_high(torch.randn(3, 32, 8, 8), weight).data_ptr() == first


def test_winograds_weight_gradient_is_summed_in_the_gradients_precision(monkeypatch):
    """The nine products are rounded to bf16, their sums to float32: so each is within an ulp of three additions."""
    product = winograd.WinogradProduct(layer_of(8, 32, 16), 32, 16, torch.bfloat16, Pool())
    nine, kept = product.nine, []
    monkeypatch.setattr(product, "nine", lambda *arguments: kept.append(nine(*arguments)) or kept[0])
    random = torch.Generator().manual_seed(0)
    images, grad = (torch.randn(6, *shape, generator=random).bfloat16() for shape in ((16, 8, 8), (32, 4, 4)))
    out = torch.empty(32, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    product.weight_grad(product.high(images), product.low(grad), out)
    m = torch.stack([torch.stack(three) for three in kept[0]]).double()
    rows = m[:2] + m[1:]
    expected = (rows[:, :2] + rows[:, 1:]).flatten(3)
    torch.testing.assert_close(winograd.weight_taps(out).flatten(3).double(), expected, rtol=0, atol=1e-4)
