"""The training step of `--fused`: equal to `dcgan.step.ReferenceStep` in exact arithmetic, and faster.

What it does differently: one pass of D over [real | fake] with separate statistics; no weight gradients of D in G's
step; operands derived from the weights once an update; backward passes written out, over buffers that stay; and
products that need fewer multiplications (`kernels.tiles`). docs/cpu.md says what each is worth on a CPU.
"""

import torch
from torch import Tensor, nn

from dcgan.stacks import Discriminator, Generator
from dcgan.step import Precision, Update
from kernels import eager
from kernels.pool import Pool


class FusedStep:
    """One training step; called and made like `ReferenceStep`.

    Args:
        generator, discriminator: modules of `dcgan.model` in training mode, on one device; their convolution weights
            are moved to channels_last memory, in place.
        optimizer_g, optimizer_d: Adam over their parameters. Its state is kept in the parameters' memory format, now
            and whenever a state is loaded, since the fused update walks both in memory order.
        update: `alternating` or `simultaneous`.
        precision: `fp32` computes in the parameters' own type, `bf16` keeps maps and matrix products in bfloat16 with
            float32 sums; parameters, gradients, statistics and losses stay as they are. `tf32` needs a GPU.

    Raises:
        ValueError: a precision or an update that is not served.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizer_g: torch.optim.Optimizer,
        optimizer_d: torch.optim.Optimizer,
        update: Update = "alternating",
        precision: Precision = "fp32",
    ):
        if update not in ("alternating", "simultaneous"):
            raise ValueError(f"update is {update!r}: accepted are 'alternating' and 'simultaneous'")
        parameter = next(generator.parameters())
        served = ("fp32", "bf16") if parameter.device.type == "cpu" else ("fp32", "tf32", "bf16")
        if precision not in served:
            raise ValueError(
                f"precision {precision!r}: the fused step on {parameter.device.type} accepts {', '.join(served)}"
            )
        self.update, self.optimizer_g, self.optimizer_d = update, optimizer_g, optimizer_d
        for model, optimizer in ((generator, optimizer_g), (discriminator, optimizer_d)):
            model.to(memory_format=torch.channels_last)
            match_layout(optimizer)
            optimizer.register_load_state_dict_post_hook(match_layout)
        self.dtype = torch.bfloat16 if precision == "bf16" else parameter.dtype
        self.pool = Pool(parameter.device)
        self.generator = Generator(generator, self.dtype, self.pool)
        self.discriminator = Discriminator(discriminator, self.dtype, self.pool)

    def backends(self) -> list[dict[str, str]]:
        """What runs each layer, for config.json and the report: the products that `kernels.products.choose` took."""
        stages = self.generator.stages + self.discriminator.stages
        return [{"layer": s.layer.name, "backend": "eager", "why": s.product.WHY} for s in stages]

    def state_dict(self) -> dict:
        """Nothing beside the networks and their optimisers; see `ReferenceStep.state_dict`."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    @torch.no_grad()
    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        """One update of both networks.

        Args:
            real: images (N, C, H, W) in [-1, 1].
            z: noise (N, nz).

        Returns:
            `dcgan.step.METRICS` (5,), on the device; nothing waits for it.
        """
        n = real.shape[0]
        images = self.pool.images("images", (2 * n, *real.shape[1:]), self.dtype)
        images[:n].copy_(real)
        fake = images[n:]
        self.generator.pack()
        self.discriminator.pack()  # the weights may have been loaded since the last step
        self.generator.forward(z, out=fake)
        logits = self.discriminator.forward(images, groups=2)
        on_real, on_fake = eager.gan_loss(logits[:n], real=True), eager.gan_loss(logits[n:], real=False)
        self.discriminator.backward(torch.cat([on_real.grad, on_fake.grad]), weights=True, images=False)
        if self.update == "alternating":
            self.optimizer_d.step()
            self.discriminator.pack()
            for_g = eager.gan_loss(self.discriminator.forward(fake, groups=1), real=True)
            by_images = self.discriminator.backward(for_g.grad, weights=False, images=True)
            after = for_g.probability
        else:
            for_g = eager.gan_loss(logits[n:], real=True)
            by_images = self.discriminator.backward(for_g.grad, weights=False, images=True)
            self.optimizer_d.step()
            after = torch.full_like(for_g.probability, float("nan"))
        self.generator.backward(by_images)
        self.optimizer_g.step()
        return torch.stack([on_real.loss + on_fake.loss, for_g.loss, on_real.probability, on_fake.probability, after])


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's tensors the memory format of their parameters."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
