"""A whole generator or discriminator on a CPU: one explicit forward and one explicit backward over `kernels.cpu`.

The stacks know the layers and their order; `kernels` knows the arithmetic. Parameters and running statistics are those
of the module; gradients are written to tensors of the stack's own. Maps and operands live in a pool and last until the
next pass, so a step allocates next to nothing. `dcgan.stacks` has the same two classes for a GPU.
"""

import torch
from torch import Tensor, nn

from dcgan.stacks import Judged
from kernels.cpu import elementwise
from kernels.cpu.products import choose
from kernels.geometry import Layer
from kernels.pool import Pool

SLOPE = {"relu": 0.0, "leaky_relu": 0.2}


class Stage:
    """One layer: its geometry, convolution, batch norm, products and gradients, and the maps of the last forward."""

    def __init__(
        self, layer: Layer, convolution: nn.Module, norm: nn.BatchNorm2d | None, dtype: torch.dtype, pool: Pool
    ):
        self.layer, self.convolution, self.norm, self.dtype, self.pool = layer, convolution, norm, dtype, pool
        self.slope = SLOPE.get(layer.activation)
        self.product = choose(layer, dtype, pool)
        self.packed = self.high = self.low = None  # operands of `product`
        self.z = self.y = self.kept = None  # the convolution's output, the activation's, batch norm's statistics
        self.weight_grad = torch.empty_like(convolution.weight)

    def pack(self) -> None:
        self.packed = self.product.pack(self.convolution.weight)

    def map(self, name: str, like: Tensor) -> Tensor:
        """A buffer of this stage for a map of `like`'s shape."""
        return self.pool.images(f"{self.layer.name}.{name}", tuple(like.shape), self.dtype)

    def scratch(self, like: Tensor) -> Tensor:
        """A buffer of `like`'s shape that the stages share: nothing in it outlives one call."""
        return self.pool.images("scratch.map", tuple(like.shape), self.dtype)

    def dense(self, z: Tensor) -> Tensor:
        """`z` itself where its memory is channels_last without gaps, else a copy in the pool."""
        return z if z.is_contiguous(memory_format=torch.channels_last) else self.map("z", z).copy_(z)

    def activate(self, z: Tensor, groups: int, out: Tensor) -> Tensor:
        """Batch norm and activation of the convolution's output, to `out`; keeps what the backward needs."""
        self.y = out
        if self.norm is None:
            elementwise.leaky_relu(z, self.slope, out)
        else:
            self.z = self.dense(z)
            self.kept = elementwise.batch_norm_act(self.z, self.norm, self.slope, groups, self.scratch(z), out)
        return out

    def activate_backward(self, grad: Tensor, weights: bool, out: Tensor) -> Tensor:
        """The gradient by the convolution's output, to `out`; with `weights`, batch norm's own go to `.grad`.

        `grad` may be that of only the forward's last groups.
        """
        n = len(grad)
        y = self.y[-n:]
        if self.norm is None:
            elementwise.leaky_relu_backward(grad, y, self.slope, out)
            return out
        kept = self.kept[-(len(self.kept) * n // len(self.y)) :]
        sums = elementwise.batch_norm_act_backward(
            grad, self.z[-n:], y, self.norm, self.slope, kept, weights, self.scratch(grad), out
        )
        if weights:
            self.norm.weight.grad, self.norm.bias.grad = sums
        return out

    def weight_backward(self, high: Tensor, low: Tensor) -> None:
        self.product.weight_grad(high, low, self.weight_grad)
        self.convolution.weight.grad = self.weight_grad


class Stack:
    """What generators and discriminators share.

    Args:
        model: in training mode.
        layers: its table.
        optimizer: over its parameters.
        dtype: of maps and matrix products.
        pool: of buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[Layer, ...],
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        pool: Pool,
    ):
        self.arch, self.optimizer = model.arch, optimizer
        model.to(memory_format=torch.channels_last)
        match_layout(optimizer)
        optimizer.register_load_state_dict_post_hook(match_layout)
        self.stages = stages(model, layers, dtype, pool)

    def refresh(self) -> bool:
        """Derive the operands from the weights, which may have been loaded since the last step."""
        for stage in self.stages:
            stage.pack()
        return False

    def update(self) -> None:
        """Adam, from the gradients that `backward` left."""
        self.optimizer.step()


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's tensors the memory format of their parameters."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def stages(model: nn.Module, layers: tuple[Layer, ...], dtype: torch.dtype, pool: Pool) -> list[Stage]:
    """A stage for each layer, with the modules of `model.main` that belong to it."""
    convolutions = [m for m in model.main if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    norms = iter([m for m in model.main if isinstance(m, nn.BatchNorm2d)])
    return [
        Stage(layer, convolution, next(norms) if layer.batch_norm else None, dtype, pool)
        for layer, convolution in zip(layers, convolutions, strict=True)
    ]


class Discriminator(Stack):
    """Forward and backward of a `dcgan.model.Discriminator`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, pool: Pool):
        super().__init__(model, model.arch.discriminator, optimizer, dtype, pool)

    def update(self) -> None:
        super().update()
        self.refresh()

    def forward(self, images: Tensor, real: tuple[bool, ...], weights: bool) -> Judged:
        """Judge images (N, C, H, W) in as many equal groups as `real` has entries, each with its own statistics.

        Args:
            images: channels_last, of the maps' dtype.
            real: for each group whether its target is 1.
            weights: whether `backward` will be asked for the weights' gradients; not needed here.
        """
        groups, x = len(real), images
        for stage, following in zip(self.stages, [*self.stages[1:], None], strict=True):
            stage.high = stage.product.high(x)
            x = stage.product.to_low(stage.high, stage.packed)
            if following:
                x = stage.activate(x, groups, following.product.high_map(len(images)))
        self.logits = x.flatten()
        return judge(self.logits, real)

    def last_as_real(self) -> Judged:
        """The last group's images of the last forward, judged against 1."""
        return judge(self.logits[len(self.logits) // 2 :], (True,))

    def backward(self, dlogits: Tensor, weights: bool) -> Tensor | None:
        """From the gradient by the logits, of the forward's images or of only its last group.

        Returns:
            With `weights` None, and the parameters' gradients are in `.grad`; without, the gradient by the images.
        """
        x = dlogits[:, None, None, None]
        for stage in reversed(self.stages):
            if stage is not self.stages[-1]:
                x = stage.activate_backward(x, weights, stage.map("dz", x))
            low = stage.product.low(x)
            if weights:
                stage.weight_backward(stage.high, low)
            if not weights or stage is not self.stages[0]:
                x = stage.product.to_high(low, stage.packed)
        return None if weights else x


def judge(logits: Tensor, real: tuple[bool, ...]) -> Judged:
    """The losses of logits (N,), in as many equal groups as `real` has entries."""
    losses = [elementwise.gan_loss(part, is_real) for part, is_real in zip(logits.chunk(len(real)), real, strict=True)]
    means = torch.stack(
        [torch.stack([loss.loss for loss in losses]), torch.stack([loss.probability for loss in losses])]
    )
    return Judged(logits, torch.cat([loss.grad for loss in losses]), means)


class Generator(Stack):
    """Forward and backward of a `dcgan.model.Generator`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, pool: Pool):
        super().__init__(model, model.arch.generator, optimizer, dtype, pool)

    def forward(self, z: Tensor, out: Tensor) -> Tensor:
        """Noise (N, nz) → images in [-1, 1], written to `out` (N, C, H, W)."""
        x = z[:, :, None, None]
        for stage in self.stages:
            stage.low = stage.product.low(x)
            x = stage.product.to_high(stage.low, stage.packed)
            if stage is not self.stages[-1]:
                x = stage.activate(x, 1, stage.map("y", x))
        self.images = torch.tanh(x, out=out)
        return out

    def backward(self, grad: Tensor) -> None:
        """From the gradient by the images, after a forward; leaves the parameters' gradients in `.grad`."""
        x = grad
        for stage in reversed(self.stages):
            by_z = stage.product.high_map(len(grad))
            if stage is self.stages[-1]:
                elementwise.tanh_backward(x, self.images, by_z)
            else:
                stage.activate_backward(x, True, by_z)
            high = stage.product.high(by_z)
            stage.weight_backward(high, stage.low)
            if stage is not self.stages[0]:
                x = stage.product.to_low(high, stage.packed)
