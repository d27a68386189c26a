"""The model family: parameter counts, sizes, names and shapes, refusals."""

import itertools

import pytest
import torch
from torch import nn

from dcgan.arch import PRESETS, SIZES, Arch
from dcgan.model import Discriminator, Generator

DCGAN64 = PRESETS["dcgan64"].arch


def example_nets(nz=100, f=64, nc=3):
    """The layers of PyTorch's DCGAN example, spelled out: the names and shapes that state dicts must share."""
    g = nn.Sequential(
        *(nn.ConvTranspose2d(nz, 8 * f, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * f), nn.ReLU()),
        *(nn.ConvTranspose2d(8 * f, 4 * f, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * f), nn.ReLU()),
        *(nn.ConvTranspose2d(4 * f, 2 * f, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * f), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * f, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU()),
        *(nn.ConvTranspose2d(f, nc, 4, 2, 1, bias=False), nn.Tanh()),
    )
    d = nn.Sequential(
        *(nn.Conv2d(nc, f, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(f, 2 * f, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * f), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(2 * f, 4 * f, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * f), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(4 * f, 8 * f, 4, 2, 1, bias=False), nn.BatchNorm2d(8 * f), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(8 * f, 1, 4, 1, 0, bias=False), nn.Sigmoid()),
    )
    return nn.ModuleDict({"main": g}), nn.ModuleDict({"main": d})


def test_dcgan64_has_the_parameters_of_the_example():
    generator, discriminator = Generator(DCGAN64), Discriminator(DCGAN64)
    assert sum(p.numel() for p in generator.parameters()) == 3_576_704
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_568


@pytest.mark.parametrize("name", PRESETS)
def test_the_layer_table_counts_what_the_modules_hold(name):
    arch = PRESETS[name].arch
    for layers, model in ((arch.generator, Generator(arch)), (arch.discriminator, Discriminator(arch))):
        assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_size_and_channel_count_makes_images_and_logits(size, channels):
    arch = Arch(image_size=size, channels=channels, nz=7, ngf=2, ndf=3)
    images = Generator(arch)(torch.randn(2, 7))
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1
    assert Discriminator(arch)(images).shape == (2,)
    for layers in (arch.generator, arch.discriminator):
        for before, after in itertools.pairwise(layers):
            assert (before.out_size, before.out_channels) == (after.in_size, after.in_channels)


def test_widths_are_capped_at_eight_times_the_base():
    arch = Arch(image_size=256, ngf=4, ndf=4)
    assert [layer.out_channels for layer in arch.generator] == [32, 32, 32, 16, 8, 4, 3]
    assert [layer.out_channels for layer in arch.discriminator] == [4, 8, 16, 32, 32, 32, 1]


def test_dense32_starts_at_8_by_8_by_256():
    first, *_, last = PRESETS["dense32"].arch.generator
    assert (first.in_channels, first.out_channels, first.out_size) == (128, 256, 8)
    assert (last.out_channels, last.out_size) == (3, 32)


def test_state_dicts_travel_to_the_example_and_back():
    for ours, theirs in zip((Generator(DCGAN64), Discriminator(DCGAN64)), example_nets(), strict=True):
        mine, other = ours.state_dict(), theirs.state_dict()
        assert [(k, v.shape) for k, v in mine.items()] == [(k, v.shape) for k, v in other.items()]
        theirs.load_state_dict(mine)
        ours.load_state_dict(other)


def test_the_same_weights_give_the_example_s_outputs():
    theirs_g, theirs_d = example_nets(f=4)
    arch = Arch(ngf=4, ndf=4)
    generator, discriminator = Generator(arch), Discriminator(arch)
    generator.load_state_dict(theirs_g.state_dict())
    discriminator.load_state_dict(theirs_d.state_dict())
    z = torch.randn(3, 100)
    images = generator(z)
    torch.testing.assert_close(images, theirs_g["main"](z[:, :, None, None]), rtol=0, atol=0)
    expected = theirs_d["main"](images).flatten()
    torch.testing.assert_close(discriminator(images).sigmoid(), expected, rtol=1e-6, atol=1e-7)


def test_initial_weights_follow_the_paper():
    generator = Generator(DCGAN64, torch.Generator().manual_seed(0))
    weight, scale = generator.main[3].weight, generator.main[4].weight
    assert weight.mean().abs() < 1e-3 and abs(weight.std() - 0.02) < 1e-3
    assert abs(scale.mean() - 1) < 1e-2 and 0.01 < scale.std() < 0.03
    assert not generator.main[4].bias.any()


def test_the_seed_decides_the_initial_weights():
    first, again, other = (Generator(Arch(ngf=2), torch.Generator().manual_seed(s)).main[0].weight for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_size": 48}, "48 is not supported"),
        ({"image_size": 512}, "512 is not supported"),
        ({"channels": 2}, "1, 3 and 4"),
        ({"nz": 0}, "nz is 0"),
        ({"ngf": -1}, "ngf is -1"),
    ],
)
def test_what_is_outside_the_family_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Arch(**settings)
