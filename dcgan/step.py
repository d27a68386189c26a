"""One training step, as the literature defines it: the reference that every faster step must equal.

1. D on real, loss against 1, backward; fake = G(z); D on fake (detached), loss against 0, backward; Adam(D).
2. The updated D on the same fake, loss against 1, backward into G; Adam(G).

Real and fake go through D apart, so each has its own batch-norm statistics, and D's running statistics move three times
a step: real, fake, fake again. Source: Radford, Metz, Chintala 2015, section 4; PyTorch's DCGAN example. The
`simultaneous` form (TensorFlow's DCGAN tutorial) takes G's gradient and D's from one pass over real and one over fake,
then applies both, so D's running statistics move twice.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Update = Literal["alternating", "simultaneous"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}

METRICS = ("loss_d", "loss_g", "d_real", "d_fake_before", "d_fake_after")
"""What a step returns, in this order: D's loss (real + fake), G's loss, and the mean of D's probability on real, on
fake before D's update and on fake after it (NaN in the simultaneous form, which never looks)."""


def adam(
    model: nn.Module, fused: bool = False, lr: float = 2e-4, beta1: float = 0.5, capturable: bool = False
) -> torch.optim.Adam:
    """The paper's optimiser, with its values as defaults. `fused` updates all tensors in one kernel; `capturable` keeps
    the step count on the device, as a CUDA graph needs it."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(beta1, 0.999), fused=fused, capturable=capturable)


def bce(logits: Tensor, real: bool) -> Tensor:
    """Mean binary cross-entropy of logits (N,) against all-ones or all-zeros; at least float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.logsigmoid(logits if real else -logits).mean()


def probability(logits: Tensor) -> Tensor:
    """Mean of D's probability that an image is real."""
    return logits.detach().float().sigmoid().mean()


class ReferenceStep:
    """The step above in plain PyTorch.

    Args:
        generator, discriminator: modules in training mode, on one device.
        optimizer_g, optimizer_d: their optimisers; the gradients are left in `.grad` after a step.
        update: `alternating` or `simultaneous`.
        precision: `bf16` and `fp16` run the forward passes under autocast (fp16 with a loss scale); `fp32` and
            `tf32` run them as they are.
        freeze: leave out D's weight gradients in G's step, which nothing reads; without it they are computed and
            thrown away, as in the example.
        compile: both networks by torch.compile, in its default mode.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizer_g: torch.optim.Optimizer,
        optimizer_d: torch.optim.Optimizer,
        update: Update = "alternating",
        precision: Precision = "fp32",
        freeze: bool = False,
        compile: bool = False,
    ):
        self.freeze = freeze
        self.generator, self.discriminator = generator, discriminator
        self.run_generator, self.run_discriminator = generator, discriminator
        if compile:
            self.run_generator, self.run_discriminator = torch.compile(generator), torch.compile(discriminator)
        self.optimizer_g, self.optimizer_d = optimizer_g, optimizer_d
        self.update, self.precision = update, precision
        self.dtype = next(generator.parameters()).dtype
        self.addresses: list[int] = []
        self.device_type = next(generator.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "fp16")

    def state_dict(self) -> dict:
        """What a step keeps beside the networks and their optimisers: fp16's loss scale."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take over `state_dict`'s, or `FusedStep`'s: scale, steps since it moved, overflows."""
        if "loss_scale" in state:
            scale, good, _ = state["loss_scale"].tolist()
            state = self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(good)}
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)

    def autocast(self) -> AbstractContextManager:
        """A region for a forward pass, without autocast's weight cache: it would outlive an optimiser's step where the
        caller has a region of its own around the step."""
        dtype = AUTOCAST_DTYPE.get(self.precision)
        enabled = dtype is not None
        return torch.autocast(self.device_type, dtype or torch.bfloat16, enabled=enabled, cache_enabled=False)

    def discriminate(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.run_discriminator(images)

    def generate(self, z: Tensor) -> Tensor:
        with self.autocast():
            return self.run_generator(z)

    def room(self, n: int) -> None:
        """No memory of its own to read images from; see `FusedStep.room`."""

    def refresh(self) -> bool:
        """Whether a parameter, or what its optimiser keeps of it, is elsewhere than at the last call, which voids a
        captured graph of this step."""
        tensors = [p for model in (self.generator, self.discriminator) for p in model.parameters()]
        for optimizer in (self.optimizer_g, self.optimizer_d):
            tensors += [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        before, self.addresses = self.addresses, [t.data_ptr() for t in tensors]
        return before != self.addresses[: len(before)]  # the first step adds the optimisers' at the end

    def run(self, real: Tensor, z: Tensor) -> Tensor:
        """The device's part of a call, which is all of it."""
        return self(real, z)

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        """One update of both networks.

        Args:
            real: images (N, C, H, W) in [-1, 1].
            z: noise (N, nz).

        Returns:
            The step's `METRICS` (5,), on the device; nothing waits for it.
        """
        return self._alternating(real, z) if self.update == "alternating" else self._simultaneous(real, z)

    def _alternating(self, real: Tensor, z: Tensor) -> Tensor:
        self.optimizer_d.zero_grad(set_to_none=True)
        logits_real = self.discriminate(real)
        loss_real = bce(logits_real, real=True)
        self.scaler.scale(loss_real).backward()

        fake = self.generate(z)
        logits_fake = self.discriminate(fake.detach())
        loss_fake = bce(logits_fake, real=False)
        self.scaler.scale(loss_fake).backward()
        self.scaler.step(self.optimizer_d)

        self.optimizer_g.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(not self.freeze)
        logits_after = self.discriminate(fake)
        loss_g = bce(logits_after, real=True)
        self.scaler.scale(loss_g).backward()
        self.discriminator.requires_grad_(True)
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
        return self._metrics(loss_real + loss_fake, loss_g, logits_real, logits_fake, logits_after)

    def _simultaneous(self, real: Tensor, z: Tensor) -> Tensor:
        parameters_g, parameters_d = list(self.generator.parameters()), list(self.discriminator.parameters())
        logits_real = self.discriminate(real)
        logits_fake = self.discriminate(self.generate(z))
        loss_d = bce(logits_real, real=True) + bce(logits_fake, real=False)
        loss_g = bce(logits_fake, real=True)
        gradients_d = torch.autograd.grad(self.scaler.scale(loss_d), parameters_d, retain_graph=True)
        gradients_g = torch.autograd.grad(self.scaler.scale(loss_g), parameters_g)
        for parameter, gradient in zip(parameters_d + parameters_g, gradients_d + gradients_g, strict=True):
            parameter.grad = gradient
        self.scaler.step(self.optimizer_d)
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
        return self._metrics(loss_d, loss_g, logits_real, logits_fake, None)

    @staticmethod
    def _metrics(
        loss_d: Tensor, loss_g: Tensor, logits_real: Tensor, logits_fake: Tensor, logits_after: Tensor | None
    ) -> Tensor:
        after = torch.full_like(loss_g, float("nan")) if logits_after is None else probability(logits_after)
        values = (loss_d, loss_g, probability(logits_real), probability(logits_fake), after)
        return torch.stack([value.detach() for value in values])
