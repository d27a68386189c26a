"""The kernels put together: a whole generator and discriminator, forward and backward, against autograd in float64.

What a fused training step computes, in its order: G; D on [real | fake] in one pass, a group each; D's gradients; and,
D frozen, G's through a second pass on the fake alone. Shows which launcher serves which pass of which layer.
"""

import pytest
import torch
from interpreter import only_interpreted

from dcgan.arch import Arch
from dcgan.model import Discriminator, Generator
from kernels.geometry import Epilogue

only_interpreted()

from kernels._triton.batch_norm import apply, merge_statistics, statistics  # noqa: E402
from kernels._triton.batch_norm_grad import apply_grad, merge_sums  # noqa: E402
from kernels._triton.conv import conv  # noqa: E402
from kernels._triton.conv_transpose import conv_transpose  # noqa: E402
from kernels._triton.head import head, head_grad  # noqa: E402
from kernels._triton.wgrad import wgrad  # noqa: E402


def packed(weight):
    return weight.detach().permute(0, 2, 3, 1).contiguous()


def unpacked(gradient):
    return gradient.permute(0, 3, 1, 2)


def convolutions(model):
    """(packed weight, batch norm or None) of each layer."""
    modules = list(model.main)
    return [
        (packed(m.weight), following if isinstance(following, torch.nn.BatchNorm2d) else None)
        for m, following in zip(modules, [*modules[1:], None], strict=True)
        if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
    ]


def merge(partials, bn):
    return merge_statistics(
        partials, bn.weight.detach(), bn.bias.detach(), bn.running_mean, bn.running_var, bn.num_batches_tracked
    )


def rows(y, groups):
    return y[..., 0].numel() // groups


def run_generator(layers, z):
    """Images (N, H, W, C), and what the backward needs: (input, raw output, state) of each layer but the last."""
    (weight, bn), *middle, (last, _) = layers
    y = (z @ weight.flatten(1)).view(len(z), 4, 4, -1)  # a plain GEMM: the library's
    state = merge(statistics(y), bn)
    kept, a = [(z, y, state)], apply(y, state, "relu")
    for weight, bn in middle:
        y, partials = conv_transpose(a, weight, Epilogue(statistics=True))
        state = merge(partials, bn)
        kept.append((a, y, state))
        a = apply(y, state, "relu")
    return conv_transpose(a, last, Epilogue("tanh"))[0], (*kept, (a, None, None))


def generator_gradients(layers, kept, dy):
    """Gradients in the order of `parameters()`, from dy, the last raw output's (tanh's derivative already applied)."""
    gradients = []
    for i in range(len(layers) - 1, 0, -1):
        a, _, _ = kept[i]
        gradients.insert(0, unpacked(wgrad(a, dy)))
        _, y, state = kept[i - 1]
        g, partials = conv(dy, layers[i][0], Epilogue("relu", saved=y, state=state))
        dweight, dbias, means = merge_sums(partials, rows(y, 1))
        gradients[:0] = [dweight, dbias]
        dy = apply_grad(g, y, state, means)
    dw = kept[0][0].T @ dy.flatten(1)
    return [unpacked(dw.view(layers[0][0].shape)), *gradients]


def run_discriminator(layers, images, real):
    """logits, dlogits, means; and (input, raw output, state) of each layer."""
    groups = len(real)
    (first, _), *middle, (last, _) = layers
    a = conv(images, first, Epilogue("leaky_relu", groups=groups))[0]
    kept = [(images, a, None)]
    for weight, bn in middle:
        y, partials = conv(a, weight, Epilogue(statistics=True, groups=groups))
        state = merge(partials, bn)
        kept.append((a, y, state))
        if weight is not middle[-1][0]:
            a = apply(y, state, "leaky_relu")
    return head(y, last, state, real), kept


def discriminator_gradients(layers, kept, dlogits, groups, image_grad):
    """Weight gradients, or with `image_grad` the images' gradient, its tanh undone, and none of the weights'."""
    _, y, state = kept[-1]
    g, partials, dw = head_grad(y, layers[-1][0], state, dlogits, weight_grad=not image_grad)
    gradients = [] if image_grad else [unpacked(dw)]
    for i in range(len(kept) - 1, 0, -1):
        x, y, state = kept[i]
        dweight, dbias, means = merge_sums(partials, rows(y, groups))
        dy = apply_grad(g, y, state, means)
        if not image_grad:
            gradients[:0] = [unpacked(wgrad(dy, x)), dweight, dbias]
        _, before, state = kept[i - 1]
        g, partials = conv_transpose(dy, layers[i][0], Epilogue("leaky_relu", groups=groups, saved=before, state=state))
    images, _, _ = kept[0]
    if image_grad:
        return conv_transpose(g, layers[0][0], Epilogue("tanh", saved=images))[0]
    return [unpacked(wgrad(g, images)), *gradients]


def models(size, dtype=torch.float32):
    arch, generator = Arch(image_size=size, nz=8, ngf=8, ndf=8), torch.Generator().manual_seed(0)
    nets = Generator(arch, generator), Discriminator(arch, generator)
    for net in nets:
        for p in net.parameters():
            if p.ndim == 4:
                p.data *= 5  # so that gradients are not all tiny
    return [net.to(dtype) for net in nets]


@pytest.mark.parametrize("size", [16, 32])
def test_gradients_of_a_step_are_autograds(size):
    generator, discriminator = models(size)
    exact_g, exact_d = models(size, torch.float64)
    noise = torch.Generator().manual_seed(1)
    z, real = torch.randn(3, 8, generator=noise), torch.rand(3, size, size, 3, generator=noise) * 2 - 1

    layers_g, layers_d = convolutions(generator), convolutions(discriminator)
    fake, kept_g = run_generator(layers_g, z)
    (logits, dlogits, means), kept = run_discriminator(layers_d, torch.cat([real, fake]), (True, False))
    ours_d = discriminator_gradients(layers_d, kept, dlogits, 2, False)
    (_, dlogits_g, means_g), kept = run_discriminator(layers_d, fake, (True,))
    dy = discriminator_gradients(layers_d, kept, dlogits_g, 1, True)
    ours_g = generator_gradients(layers_g, kept_g, dy)

    exact_fake = exact_g(z.double())
    exact_real = exact_d(real.double().permute(0, 3, 1, 2))
    exact_logits = torch.cat([exact_real, exact_d(exact_fake.detach())])
    losses = [
        -torch.nn.functional.logsigmoid(sign * part).mean()
        for sign, part in zip((1, -1), exact_logits.chunk(2), strict=True)
    ]
    exact_gradients_d = torch.autograd.grad(sum(losses), list(exact_d.parameters()))
    loss_g = -torch.nn.functional.logsigmoid(exact_d(exact_fake)).mean()
    exact_gradients_g = torch.autograd.grad(loss_g, list(exact_g.parameters()))

    def close(ours, exact, name):
        assert ours.shape == exact.shape, name
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 5e-5, (name, float(error))

    close(fake.permute(0, 3, 1, 2), exact_fake.detach(), "fake")
    close(logits, exact_logits.detach(), "logits")
    close(means[0], torch.stack(losses).detach(), "D's losses")
    close(means_g[0], loss_g.detach()[None], "G's loss")
    for ours, exact, net, reference in (
        (ours_d, exact_gradients_d, discriminator, exact_d),
        (ours_g, exact_gradients_g, generator, exact_g),
    ):
        for mine, theirs, (name, _) in zip(ours, exact, net.named_parameters(), strict=True):
            close(mine, theirs, name)
        for (name, mine), theirs in zip(net.named_buffers(), reference.buffers(), strict=True):
            close(mine, theirs, name)
