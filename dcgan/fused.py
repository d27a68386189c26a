"""The training step of `--fused`: equal to `dcgan.step.ReferenceStep` in exact arithmetic, and faster.

What it does differently: one pass of D over [real | fake] with separate statistics; no weight gradients of D in G's
step; operands derived from the weights once an update; backward passes written out, over buffers that stay. On a CPU
the networks are `dcgan.cpu_stacks`, with products that need fewer multiplications (docs/cpu.md says what each part is
worth); on a GPU `dcgan.stacks`, over the fused kernels, and a step is nothing but launches (docs/step.md).
"""

from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from dcgan import cpu_stacks, stacks
from dcgan.step import AUTOCAST_DTYPE, Precision, Update
from kernels import tuning
from kernels.dependent import dependent_launches
from kernels.launchers import launchers
from kernels.pool import Pool

FIRST_SCALE = 2.0**16
"""Of the loss in fp16, as torch.amp.GradScaler begins."""

SERVED = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}


class FusedStep:
    """One training step; called and made like `ReferenceStep`.

    Args:
        generator, discriminator: modules of `dcgan.model` in training mode, on one device; their convolution weights
            are moved to channels_last memory, in place.
        optimizer_g, optimizer_d: Adam over their parameters. Its state is kept in the parameters' memory format, now
            and whenever a state is loaded, since the fused update walks both in memory order.
        update: `alternating` or `simultaneous`.
        precision: `fp32` computes in the parameters' own type; `bf16` and `fp16` keep maps and matrix products in 16
            bits with float32 sums, fp16 with a loss scale that lives on the device; parameters, gradients, statistics
            and losses stay as they are. `tf32` and `fp16` need a GPU.
        launch: the launchers that the stacks run over, of `kernels.launchers`; None: `auto`'s on a GPU, and on a
            CPU the products of `kernels.cpu.products`.

    Attributes:
        dependent: whether kernels are launched as `kernels.dependent` has it; None, the default, as is fastest in the
            device's tuned table, and not without one. A captured graph keeps what it was captured with.

    Raises:
        ValueError: a precision, an update or an option of the optimiser that is not served.
    """

    dependent: bool | None = None

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizer_g: torch.optim.Optimizer,
        optimizer_d: torch.optim.Optimizer,
        update: Update = "alternating",
        precision: Precision = "fp32",
        launch: ModuleType | SimpleNamespace | None = None,
    ):
        if update not in ("alternating", "simultaneous"):
            raise ValueError(f"update is {update!r}: accepted are 'alternating' and 'simultaneous'")
        parameter = next(generator.parameters())
        device = parameter.device
        if precision not in SERVED[device.type] and launch is None:
            accepted = ", ".join(SERVED[device.type])
            raise ValueError(f"precision {precision!r}: the fused step on {device.type} accepts {accepted}")
        self.update, self.optimizer_g, self.optimizer_d, self.precision = update, optimizer_g, optimizer_d, precision
        self.dtype = AUTOCAST_DTYPE.get(precision, parameter.dtype)
        self.pool, self.loss_scale = Pool(device), None
        if launch is None and device.type == "cpu":
            parts = (self.dtype, self.pool)
            self.generator = cpu_stacks.Generator(generator, optimizer_g, *parts)
            self.discriminator = cpu_stacks.Discriminator(discriminator, optimizer_d, *parts)
        else:
            if precision == "fp16":
                self.loss_scale = torch.tensor([FIRST_SCALE, 0.0, 0.0], device=device)
            parts = (launch or launchers("auto"), self.dtype, precision, self.loss_scale)
            self.generator = stacks.Generator(generator, optimizer_g, *parts)
            self.discriminator = stacks.Discriminator(discriminator, optimizer_d, *parts)

    def state_dict(self) -> dict:
        """What a step keeps beside the networks and their optimisers: fp16's loss scale."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.cpu()}

    def load_state_dict(self, state: dict) -> None:
        """Take over `state_dict`'s, or `ReferenceStep`'s, torch.amp.GradScaler's."""
        if "scale" in state:
            state = {"loss_scale": torch.tensor([state["scale"], state["_growth_tracker"], 0.0])}
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.copy_(state["loss_scale"])

    def refresh(self) -> bool:
        """Take over what changed outside since the last step: weights, optimiser states.

        Returns:
            Whether that voids a captured graph of this step: tensors are elsewhere, or an optimiser's options are not
            what they were.
        """
        return bool(self.generator.refresh() | self.discriminator.refresh())

    def room(self, n: int) -> Tensor:
        """Where the step reads n real images (n, C, H, W) from, of its own type, channels_last: fill it and hand it
        over, and nothing is copied. The same memory whenever n is the same."""
        return self._images(n)[:n]

    def _images(self, n: int) -> Tensor:
        arch = self.discriminator.arch
        shape = (2 * n, arch.channels, arch.image_size, arch.image_size)
        return self.pool.images("images" if self.pool.device.type == "cpu" else f"images.{n}", shape, self.dtype)

    @torch.no_grad()
    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        """One update of both networks.

        Args:
            real: images (N, C, H, W) in [-1, 1]; best those of `room`.
            z: noise (N, nz).

        Returns:
            `dcgan.step.METRICS` (5,), on the device; nothing waits for it.
        """
        self.refresh()
        return self.run(real, z)

    @torch.no_grad()
    def run(self, real: Tensor, z: Tensor) -> Tensor:
        """The device's part of a call: what a CUDA graph captures."""
        ask = self.dependent
        if ask is None:
            ask, _ = tuning.dependent(tuning.device_name(self.pool.device), self.precision, len(real))
        with dependent_launches(ask), torch.autocast(self.pool.device.type, enabled=False):  # of the caller's
            return self._run(real, z)

    def _run(self, real: Tensor, z: Tensor) -> Tensor:
        n = real.shape[0]
        images = self._images(n)
        if real.data_ptr() != images.data_ptr():
            images[:n].copy_(real)
        d, fake = self.discriminator, images[n:]
        self.generator.forward(z, out=fake)
        for_d = d.forward(images, real=(True, False), weights=True)
        d.backward(for_d.dlogits, weights=True)
        if self.update == "alternating":
            d.update()
            for_g = d.forward(fake, real=(True,), weights=False)
            after = for_g.means[1, 0]
        else:
            for_g = d.last_as_real()
            after = torch.full_like(for_g.means[1, 0], float("nan"))
        by_images = d.backward(for_g.dlogits, weights=False)
        if self.update == "simultaneous":
            d.update()
        self.generator.backward(by_images)
        self.generator.update()
        loss_d, p = for_d.means[0, 0] + for_d.means[0, 1], for_d.means[1]
        return torch.stack([loss_d, for_g.means[0, 0], p[0], p[1], after])
