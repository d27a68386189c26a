"""Generator and discriminator, built from the layer table of `dcgan.arch`.

State dicts have the names and shapes of the PyTorch DCGAN example (`main.0.weight`, …), so files travel both ways. The
discriminator returns logits; where the example's `main` ends in a Sigmoid, which has no state, ours ends before it.
"""

import torch
from torch import Tensor, nn

from dcgan.arch import Arch
from kernels.geometry import Layer

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "tanh": nn.Tanh,
}


def _stack(layers: tuple[Layer, ...]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for layer in layers:
        conv = nn.Conv2d if layer.kind == "conv" else nn.ConvTranspose2d
        ends = (layer.in_channels, layer.out_channels)
        modules.append(conv(*ends, layer.kernel, layer.stride, layer.padding, bias=False))
        if layer.batch_norm:
            modules.append(nn.BatchNorm2d(layer.out_channels))
        if layer.activation != "none":
            modules.append(ACTIVATIONS[layer.activation]())
    return nn.Sequential(*modules)


def _initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    """Weights N(0, 0.02), batch-norm weights N(1, 0.02), batch-norm biases 0. Source: DCGAN paper, section 4."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """Images from noise.

    Args:
        arch: which member of the family.
        generator: random generator of the initial weights (CPU); None: torch's default.
    """

    def __init__(self, arch: Arch, generator: torch.Generator | None = None):
        super().__init__()
        self.arch = arch
        self.main = _stack(arch.generator)
        _initialise(self, generator)

    def forward(self, z: Tensor) -> Tensor:
        """z (N, nz) or (N, nz, 1, 1) → images (N, channels, image_size, image_size) in [-1, 1]."""
        return self.main(z if z.ndim == 4 else z[:, :, None, None])


class Discriminator(nn.Module):
    """One logit per image: the log-odds that it is real. Arguments as for `Generator`."""

    def __init__(self, arch: Arch, generator: torch.Generator | None = None):
        super().__init__()
        self.arch = arch
        self.main = _stack(arch.discriminator)
        _initialise(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, image_size, image_size) in [-1, 1] → logits (N,)."""
        return self.main(images).flatten()
