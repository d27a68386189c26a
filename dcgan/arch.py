"""What a DCGAN looks like: the layer table of every member of the family. No torch.

The family is one construction. A generator starts with a `start`×`start` feature map made from z by a transposed
convolution of one pixel (a dense layer by another name), doubles the size with k4 s2 p1 transposed convolutions, and
ends at the image; a discriminator is its mirror. Widths double from the image end and are capped at eight times the
base width. Source: Radford, Metz, Chintala 2015, arXiv:1511.06434, figure 1.
"""

from dataclasses import dataclass
from functools import cached_property

from kernels.geometry import Layer

SIZES = (16, 28, 32, 64, 128, 256)
WIDTH_CAP = 8


@dataclass(frozen=True)
class Arch:
    """One member of the family.

    Args:
        image_size: height and width of the images, in pixels: one of `SIZES`.
        channels: image channels, 1, 3 or 4.
        nz: length of z.
        ngf, ndf: channels of the layer next to the image, in the generator and the discriminator.
        dense: start from an 8×8 feature map, as the form with a dense layer does, rather than from 4×4.

    Raises:
        ValueError: the size is not supported, or a width is not positive; the message says what is accepted.
    """

    image_size: int = 64
    channels: int = 3
    nz: int = 100
    ngf: int = 64
    ndf: int = 64
    dense: bool = False

    def __post_init__(self):
        if self.image_size not in SIZES:
            raise ValueError(f"image size {self.image_size} is not supported: choose one of {SIZES}")
        if self.channels not in (1, 3, 4):
            raise ValueError(f"{self.channels} image channels: accepted are 1, 3 and 4")
        for name in ("nz", "ngf", "ndf"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def start(self) -> int:
        """Size of the first feature map, in pixels: what is left of the image after halving it to 8 or less."""
        return 7 if self.image_size == 28 else 8 if self.dense else 4

    @property
    def doublings(self) -> int:
        """How many layers of stride 2 lie between the first feature map and the image."""
        return (self.image_size // self.start).bit_length() - 1

    def _width(self, base: int, halvings: int) -> int:
        """Channels of the feature map whose size is image_size / 2**halvings."""
        return base * min(2 ** (halvings - 1), WIDTH_CAP)

    @cached_property
    def generator(self) -> tuple[Layer, ...]:
        n, start = self.doublings, self.start
        width = self._width(self.ngf, n)
        layers = [Layer("G1", "conv_transpose", self.nz, width, 1, start, 1, 0, True, "relu")]
        for i in range(1, n):
            narrower = self._width(self.ngf, n - i)
            layers.append(
                Layer(f"G{i + 1}", "conv_transpose", width, narrower, start << (i - 1), 4, 2, 1, True, "relu")
            )
            width = narrower
        half = self.image_size // 2
        layers.append(Layer(f"G{n + 1}", "conv_transpose", width, self.channels, half, 4, 2, 1, False, "tanh"))
        return tuple(layers)

    @cached_property
    def discriminator(self) -> tuple[Layer, ...]:
        n = self.doublings
        layers = [Layer("D1", "conv", self.channels, self.ndf, self.image_size, 4, 2, 1, False, "leaky_relu")]
        for i in range(1, n):
            narrow, wide = self._width(self.ndf, i), self._width(self.ndf, i + 1)
            layers.append(Layer(f"D{i + 1}", "conv", narrow, wide, self.image_size >> i, 4, 2, 1, True, "leaky_relu"))
        last = self._width(self.ndf, n)
        layers.append(Layer(f"D{n + 1}", "conv", last, 1, self.start, self.start, 1, 0, False, "none"))
        return tuple(layers)


@dataclass(frozen=True)
class Preset:
    """An architecture and the batch and length of training that go with it; the command line overrides each value."""

    arch: Arch
    batch_size: int
    epochs: int
    summary: str


PRESETS = {
    "dcgan64": Preset(Arch(), 64, 25, "64×64, the PyTorch example's layers and hyperparameters"),
    "paper": Preset(Arch(ngf=128, ndf=128), 128, 25, "64×64 with the paper's 128 filters and batch of 128"),
    "mnist28": Preset(Arch(image_size=28, channels=1), 64, 25, "28×28, for MNIST and Fashion-MNIST unscaled"),
    "dense32": Preset(Arch(image_size=32, nz=128, ngf=128, ndf=128, dense=True), 64, 25, "32×32 from a dense 8×8×256"),
    "small32": Preset(Arch(image_size=32, nz=64, ngf=32, ndf=32), 64, 40, "32×32, thin enough for a laptop's CPU"),
}
