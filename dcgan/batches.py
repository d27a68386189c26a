"""The order of the data and the noise: functions of the seed alone, whatever device or backend trains."""

import hashlib

import numpy as np
import torch
from torch import Tensor

RESIDENT_FRACTION = 0.25  # of the device's free memory: what a data set may take to live there as uint8


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from a seed and what it is for; distinct purposes get independent streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30


class Batches:
    """Shuffled batches of a uint8 image set, each picture once an epoch, the last batch of an epoch smaller.

    Args:
        images: uint8 (N, H, W, C), as `dcgan.data.open_images` gives it; copied to the device where it is small
            beside the free memory there, else gathered from the memory map a batch at a time.
        batch_size: images a batch.
        seed: of the order and the mirroring.
        flip: mirror each picture left to right with probability one half, drawn anew each epoch.
        device: where the batches go.
        channels_last: memory format of the batches.
    """

    def __init__(
        self,
        images: np.ndarray,
        batch_size: int,
        seed: int,
        flip: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ):
        self.batch_size, self.seed, self.flip, self.device = batch_size, seed, flip, torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.count = len(images)
        self.resident = images.nbytes <= RESIDENT_FRACTION * _free_bytes(self.device)
        self.images = torch.from_numpy(np.array(images)).to(self.device) if self.resident else images
        self._epoch: int | None = None

    @property
    def per_epoch(self) -> int:
        """Batches an epoch, the last smaller one included."""
        return -(-self.count // self.batch_size)

    def _draw(self, epoch: int, course: int) -> None:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch, course))
        self._order = torch.randperm(self.count, generator=generator)
        self._mirrored = torch.rand(self.count, generator=generator) < 0.5 if self.flip else None
        self._epoch = (epoch, course)

    def __call__(self, step: int, course: int = 0) -> Tensor:
        """The batch of training step `step`, counted from 0.

        Args:
            step: which batch.
            course: a number that changes the order, for a run that was rolled back and must not meet the same again.

        Returns:
            Images (n, C, H, W), float32 in [-1, 1], n = `batch_size` or what is left of the epoch.
        """
        epoch, position = divmod(step, self.per_epoch)
        if self._epoch != (epoch, course):
            self._draw(epoch, course)
        chosen = slice(position * self.batch_size, (position + 1) * self.batch_size)
        rows = self._order[chosen]
        if self.resident:
            batch = self.images[rows.to(self.device)]
        else:
            batch = torch.from_numpy(self.images[rows.numpy()]).to(self.device)
        batch = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
        batch = batch.mul_(2 / 255).sub_(1)
        if self._mirrored is not None:
            mirrored = self._mirrored[chosen].to(self.device)[:, None, None, None]
            batch = torch.where(mirrored, batch.flip(3), batch)
        return batch


class Noise:
    """Standard normal z from a generator of the device, whose state is part of a checkpoint."""

    def __init__(self, nz: int, seed: int, device: torch.device | str):
        self.nz, self.seed, self.device = nz, seed, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(derived_seed(seed, "noise"))

    def __call__(self, n: int) -> Tensor:
        """z (n, nz), float32."""
        return torch.randn(n, self.nz, generator=self.generator, device=self.device)

    def fixed(self, n: int) -> Tensor:
        """The same z (n, nz) at every call: what the samples along a run are made from."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "samples"))
        return torch.randn(n, self.nz, generator=generator).to(self.device)

    def restart(self, *parts: int) -> None:
        """Begin another stream, named by `parts`: after a rollback, or on a device that the state was not made on."""
        self.generator.manual_seed(derived_seed(self.seed, "noise", *parts))
