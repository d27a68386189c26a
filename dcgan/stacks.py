"""A whole generator or discriminator over the launchers of `kernels`: one explicit forward, one explicit backward.

Where modules hand each other finished maps, a stack fuses across layers: a layer's batch-norm reductions happen in the
epilogue of the next layer's data gradient, the tanh of the images is undone in the data gradient of D's first layer,
D's last batch norm is applied as its head reads it, and the real and the fake images go through D together, a group
each. Maps are NHWC; the launchers' twins in `kernels.reference` run the same code in float64 on a CPU.
"""

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcgan.weights import Weights
from kernels import reference, tuning
from kernels.geometry import STATE, Deferred, Epilogue, Layer, Merge, MergeGradients, Partials, Shares


class Judged(NamedTuple):
    """What D says of a batch.

    logits: (N,). dlogits: (N,), the gradient of the sum of the groups' mean losses, times the loss scale.
    means: (2, groups): each group's mean loss, and the mean probability that its images are real.
    """

    logits: Tensor
    dlogits: Tensor
    means: Tensor


class Stage(NamedTuple):
    """A layer with its packed weight and gradient, (low, R, S, high) both, and its batch norm."""

    layer: Layer
    weight: Tensor
    grad: Tensor
    norm: nn.BatchNorm2d | None


class Kept(NamedTuple):
    """Of a layer's forward pass, for its backward: input (None where no weight gradient is wanted), raw output (the
    activated one without batch norm), and batch-norm state."""

    x: Tensor | Deferred | None
    y: Tensor
    state: Tensor | None


class Stack:
    """What generators and discriminators share.

    Args:
        model: of `dcgan.model`, in training mode.
        layers: its table.
        optimizer: Adam over its parameters.
        launch: a backend's launchers.
        dtype: of maps and matrix products.
        precision: `tf32` lets float32 products use the tensor cores.
        loss_scale: of `dcgan.weights.Weights`, of both networks; None for none.
    """

    last = False  # whether this network's update is the step's last

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[Layer, ...],
        optimizer: torch.optim.Adam,
        launch: ModuleType | SimpleNamespace,
        dtype: torch.dtype,
        precision: str,
        loss_scale: Tensor | None,
    ):
        self.model, self.arch, self.layers, self.launch = model, model.arch, layers, launch
        self.weights = Weights(model, optimizer, launch, dtype, loss_scale, self.last)
        self.options = {} if launch is reference else {"precision": "tf32" if precision == "tf32" else "ieee"}
        self.precision = precision
        self.bind()

    def bind(self) -> None:
        """Find the tensors of each layer; again after they moved."""
        convolutions = [m for m in self.model.main if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        norms = iter([m for m in self.model.main if isinstance(m, nn.BatchNorm2d)])
        self.stages = [
            Stage(
                layer,
                self.weights.packed(convolution.weight),
                convolution.weight.grad.permute(0, 2, 3, 1),
                next(norms) if layer.batch_norm else None,
            )
            for layer, convolution in zip(self.layers, convolutions, strict=True)
        ]

    def refresh(self) -> bool:
        """Take over what changed outside; True where that voids a captured graph."""
        void = self.weights.refresh()
        if void:
            self.bind()
        return void

    def update(self) -> None:
        """Adam, from the gradients that `backward` left."""
        self.weights.update()

    def normalised(self, stage: Stage, groups: int = 1) -> Epilogue:
        """The epilogue that takes and merges a layer's statistics; its running statistics move."""
        n = stage.norm
        merge = Merge(
            n.weight.detach(), n.bias.detach(), n.running_mean, n.running_var, n.num_batches_tracked, n.eps, n.momentum
        )
        return Epilogue(groups=groups, statistics=True, merge=merge)

    def state(self, epilogue: Epilogue, found: Partials | Tensor) -> Tensor:
        """The batch-norm state that an epilogue left, by a launch more where the backend does not merge."""
        return found if isinstance(found, Tensor) else self.launch.merge_statistics(found, *epilogue.merge)

    def handed_on(self, stage: Stage, into: Stage, y: Tensor, state: Tensor, weights: bool = True) -> Tensor | Deferred:
        """A layer's raw map as the next one reads it: activated, or left as it is where the loads had better do it."""
        x = Deferred(y, state, stage.layer.activation)
        found = tuning.deferred(tuning.device_name(y.device), into.layer, self.precision, len(y), weights)
        return x if found[0] else self.launch.apply(*x)

    def below(self, stage: Stage, kept: Kept, groups: int, weights: bool) -> Epilogue:
        """The epilogue of a data gradient that goes on through the activation and batch norm of the layer below."""
        merge = None
        if stage.norm is not None:
            merge = MergeGradients(stage.norm.weight.grad, stage.norm.bias.grad) if weights else MergeGradients()
        state = kept.state if stage.norm is not None else None
        return Epilogue(stage.layer.activation, groups=groups, saved=kept.y, state=state, merge=merge)

    def norm_backward(self, stage: Stage, kept: Kept, g: Tensor, found: Partials | Tensor, weights: bool) -> Tensor:
        """From the gradient behind the activation, and its sums or their means, to the one by the raw output."""
        if not isinstance(found, Tensor):
            rows = kept.y[..., 0].numel() // kept.state.shape[1]
            out = (stage.norm.weight.grad, stage.norm.bias.grad) if weights else None
            _, _, found = self.launch.merge_sums(found, rows, out)
        return self.launch.apply_grad(g, kept.y, kept.state, found)


class Discriminator(Stack):
    """Forward and backward of a `dcgan.model.Discriminator`."""

    def __init__(self, model: nn.Module, *parts):
        super().__init__(model, model.arch.discriminator, *parts)

    def forward(self, images: Tensor, real: tuple[bool, ...], weights: bool) -> Judged:
        """Judge images (N, C, H, W) in as many equal groups as `real` has entries, each with its own statistics.

        Args:
            images: channels_last, of the maps' dtype.
            real: for each group whether its target is 1.
            weights: whether `backward` will be asked for the weights' gradients.
        """
        groups, x = len(real), images.permute(0, 2, 3, 1)
        self.images, self.kept, self.groups = x, [], groups
        *body, head = self.stages
        for stage, following in zip(body, self.stages[1:], strict=True):
            layer, last = stage.layer, following is head
            if stage.norm is None:
                raw = Epilogue(groups=groups) if last else Epilogue(layer.activation, groups=groups)
                y, _ = self.launch.conv(x, stage.weight, raw, **self.options)
                state = identity(groups, y) if last else None
            else:
                epilogue = self.normalised(stage, groups)
                y, found = self.launch.conv(x, stage.weight, epilogue, **self.options)
                state = self.state(epilogue, found)
            self.kept.append(Kept(x if weights else None, y, state))
            x = y if stage.norm is None or last else self.handed_on(stage, following, y, state, weights)
        self.judged = Judged(
            *self.launch.head(x, head.weight, state, real, body[-1].layer.activation, scale=self.weights.loss_scale)
        )
        return self.judged

    def last_as_real(self) -> Judged:
        """The last group's images of the last forward, judged against 1 instead of 0; probability as it was."""
        n = len(self.judged.logits) // self.groups
        logits, dlogits, means = self.judged.logits[-n:], self.judged.dlogits[-n:], self.judged.means[:, -1:]
        scale = 1.0 if self.weights.loss_scale is None else self.weights.loss_scale[0]
        loss = means[:1] - logits.mean()  # softplus(−l) = softplus(l) − l
        return Judged(logits, dlogits - scale / n, torch.cat([loss, means[1:]]))

    def backward(self, dlogits: Tensor, weights: bool) -> Tensor | None:
        """From the gradient by the logits, of the forward's images or of only its last group.

        Returns:
            With `weights` None, and the parameters' gradients are in place; without, the gradient by what the tanh of
            the images saw, (n, H, W, C).
        """
        *body, head = self.stages
        kept = self.kept
        if len(dlogits) != len(self.images):
            kept = [last_group(k, len(dlogits)) for k in kept]
        groups = self.groups * len(dlogits) // len(self.images)
        g, partials, _ = self.launch.head_grad(
            kept[-1].y,
            head.weight,
            kept[-1].state,
            dlogits,
            body[-1].layer.activation,
            weight_grad=weights,
            out=head.grad if weights else None,
            merge=self.below(body[-1], kept[-1], groups, weights).merge,
        )
        pending: list[Shares] = []
        for i in range(len(body) - 1, -1, -1):
            stage = body[i]
            dy = g if stage.norm is None else self.norm_backward(stage, kept[i], g, partials, weights)
            if weights:
                self.launch.wgrad(dy, kept[i].x, out=stage.grad, pending=pending, **self.options)
            if i:
                into = self.below(body[i - 1], kept[i - 1], groups, weights)
                g, partials = self.launch.conv_transpose(dy, stage.weight, into, **self.options)
        if weights:
            self.launch.sum_shares(pending)
            return None
        into = Epilogue("tanh", saved=self.images[-len(dlogits) :])
        return self.launch.conv_transpose(dy, body[0].weight, into, **self.options)[0]


class Generator(Stack):
    """Forward and backward of a `dcgan.model.Generator`."""

    last = True

    def __init__(self, model: nn.Module, *parts):
        super().__init__(model, model.arch.generator, *parts)

    def forward(self, z: Tensor, out: Tensor) -> None:
        """Noise (N, nz) → images in [-1, 1], written to `out` (N, C, H, W), channels_last."""
        out = out.permute(0, 2, 3, 1)
        first, *middle, last = self.stages
        z = z.to(self.weights.dtype)
        y = (z @ first.weight.flatten(1)).view(len(z), *first.weight.shape[1:])
        epilogue = self.normalised(first)
        state = self.state(epilogue, self.launch.statistics(y, 1, epilogue.merge))
        self.kept = [Kept(z, y, state)]
        x = self.handed_on(first, self.stages[1], y, state)
        for stage, following in zip(middle, self.stages[2:], strict=True):
            epilogue = self.normalised(stage)
            y, found = self.launch.conv_transpose(x, stage.weight, epilogue, **self.options)
            state = self.state(epilogue, found)
            self.kept.append(Kept(x, y, state))
            x = self.handed_on(stage, following, y, state)
        self.launch.conv_transpose(x, last.weight, Epilogue(last.layer.activation), out=out, **self.options)
        self.kept.append(Kept(x, out, None))

    def backward(self, dy: Tensor) -> None:
        """From the gradient by what the images' tanh saw; leaves the parameters' gradients in place."""
        pending: list[Shares] = []
        for i in range(len(self.stages) - 1, 0, -1):
            stage, before, below = self.stages[i], self.kept[i - 1], self.stages[i - 1]
            self.launch.wgrad(self.kept[i].x, dy, out=stage.grad, pending=pending, **self.options)
            into = self.below(below, before, 1, True)
            g, partials = self.launch.conv(dy, stage.weight, into, **self.options)
            dy = self.norm_backward(below, before, g, partials, True)
        product(self.kept[0].x.t(), dy.flatten(1), self.stages[0].grad.flatten(1))
        self.launch.sum_shares(pending)
        self.kept = []


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a·b in the type of `out`, at least as wide as theirs."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def last_group(kept: Kept, images: int) -> Kept:
    """The same of only the last group."""
    state = None if kept.state is None else kept.state[:, -1:].contiguous()
    y = kept.y[-images:]
    return Kept(kept.x, y if y.data_ptr() % 16 == 0 else y.clone(), state)  # the kernels read whole 16 bytes


def identity(groups: int, y: Tensor) -> Tensor:
    """The state of a batch norm that changes nothing, for a layer before the head that has none."""
    state = torch.zeros(
        (len(STATE), groups, y.shape[3]), dtype=torch.promote_types(y.dtype, torch.float32), device=y.device
    )
    state[STATE.index("scale")] = state[STATE.index("rstd")] = 1
    return state
