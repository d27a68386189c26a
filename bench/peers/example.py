"""The PyTorch DCGAN example's networks and training loop, re-stated: the rung that every speed-up is counted from.

Faithful in what costs time and what decides the numbers: NCHW, fp32, a sigmoid at D's end under `BCELoss`, D's three
passes apart, D's weight gradients computed in G's step too and thrown away, Adam as it comes, and the same values read
back to the host at the same places. Independent of `dcgan`, so that the tests can hold the reference step against it.
Source: PyTorch's examples, dcgan/main.py.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Layers under `main`, as the example's state dicts name them; weights N(0, 0.02), batch norm's N(1, 0.02)."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.main = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def generator(nz: int = 100, ngf: int = 64, channels: int = 3, multiples: tuple[int, ...] = (8, 4, 2, 1)) -> Network:
    """z (N, nz, 1, 1) → images; `multiples` of `ngf` are the widths from z on (the example's four give 64×64)."""
    widths = [ngf * multiple for multiple in multiples]
    layers = [nn.ConvTranspose2d(nz, widths[0], 4, 1, 0, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
    for wide, narrow in pairwise(widths):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True)]
    return Network([*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False), nn.Tanh()])


def discriminator(ndf: int = 64, channels: int = 3, multiples: tuple[int, ...] = (1, 2, 4, 8)) -> Network:
    """Images → probability (N, 1, 1, 1); `multiples` of `ndf` are the widths from the image on."""
    widths = [ndf * multiple for multiple in multiples]
    layers = [nn.Conv2d(channels, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.LeakyReLU(0.2, True)]
    return Network([*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False), nn.Sigmoid()])


class ExampleStep:
    """One iteration of the example's inner loop.

    Args:
        g, d: networks of this module.
    """

    def __init__(self, g: nn.Module, d: nn.Module):
        self.g, self.d = g, d
        self.criterion = nn.BCELoss()
        self.adam_d = torch.optim.Adam(d.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.adam_g = torch.optim.Adam(g.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def __call__(self, real: Tensor, z: Tensor) -> tuple[float, ...]:
        """Images (N, C, H, W) and noise (N, nz) → D's loss, G's loss, mean D(x), mean D(G(z)) before and after."""
        self.d.zero_grad()
        label = torch.full((real.size(0),), 1.0, dtype=real.dtype, device=real.device)
        output = self.d(real).view(-1)
        loss_real = self.criterion(output, label)
        loss_real.backward()
        d_real = output.mean().item()

        fake = self.g(z[:, :, None, None])
        label.fill_(0.0)
        output = self.d(fake.detach()).view(-1)
        loss_fake = self.criterion(output, label)
        loss_fake.backward()
        d_fake_before = output.mean().item()
        loss_d = loss_real + loss_fake
        self.adam_d.step()

        self.g.zero_grad()
        label.fill_(1.0)
        output = self.d(fake).view(-1)
        loss_g = self.criterion(output, label)
        loss_g.backward()
        d_fake_after = output.mean().item()
        self.adam_g.step()
        return loss_d.item(), loss_g.item(), d_real, d_fake_before, d_fake_after
