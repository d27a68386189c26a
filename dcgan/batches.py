"""The order of the data and the noise: functions of the seed only, whatever device or backend trains."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from dcgan.streaming import Ring, send
from kernels.dispatch import why_not
from kernels.launchers import launchers

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
    """Shuffled batches of a uint8 image set, each picture once per epoch, the last batch of an epoch smaller.

    A batch is in two parts: `seek` is the host's, and sends a new epoch's order to the device, or what is streamed;
    `take` is the device's, and reads no value of the host's, so that a CUDA graph can hold it.

    Args:
        images: uint8 (N, H, W, C), as `dcgan.data.open_images` gives it; copied to the device where it is small
            beside the free memory there, else streamed through two batches of room on it (`dcgan.streaming`).
        batch_size: images per batch.
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
        if self.resident:
            self.ring, self.rows = None, torch.from_numpy(np.array(images)).to(self.device)
        else:
            self.ring = Ring(images, batch_size, self.device)
            self.rows = self.ring.rows
        places = len(self.rows)
        self.permutation = torch.arange(places, device=self.device)
        self.mirrored = torch.zeros(places, dtype=torch.uint8, device=self.device) if flip else None
        self.cursor = torch.zeros((), dtype=torch.int64, device=self.device)
        triton = why_not("triton", self.device, torch.float32) is None and self.device.type == "cuda"
        self._gather = launchers("triton" if triton else "eager").gather
        self._orders: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self._epoch: tuple[int, int] | None = None  # whose order is on the device
        self._next = 0  # where the cursor is

    @property
    def per_epoch(self) -> int:
        """Batches per epoch, the last, smaller one included."""
        return -(-self.count // self.batch_size)

    def size(self, step: int) -> int:
        """Images of the batch of training step `step`: `batch_size`, or what is left of the epoch."""
        return min(self.batch_size, self.count - step % self.per_epoch * self.batch_size)

    def _drawn(self, epoch: int, course: int) -> tuple[Tensor, Tensor | None]:
        """An epoch's order, and which of its places are mirrored; the last two epochs' are kept."""
        if (epoch, course) in self._orders:
            return self._orders[epoch, course]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch, course))
        order = torch.randperm(self.count, generator=generator)
        mirrored = torch.rand(self.count, generator=generator) < 0.5 if self.flip else None
        kept = list(self._orders.items())[-1:]
        self._orders = {**dict(kept), (epoch, course): (order, None if mirrored is None else mirrored.to(torch.uint8))}
        return self._orders[epoch, course]

    def seek(self, step: int, course: int = 0) -> int:
        """Make the next `take` that of training step `step`, counted from 0.

        Args:
            step: which batch.
            course: a number that changes the order, for a run that was rolled back and must not meet the same again.

        Returns:
            How many images it has.
        """
        epoch, position = divmod(step, self.per_epoch)
        n = self.size(step)
        if self.ring is None:
            start = position * self.batch_size
            if self._epoch != (epoch, course):
                order, mirrored = self._drawn(epoch, course)
                send(order, self.permutation)
                if mirrored is not None:
                    send(mirrored, self.mirrored)
                self._epoch = (epoch, course)
        else:
            start = self.ring.turn(step, course, self._chosen, self.mirrored)
        if start != self._next:
            self.cursor.fill_(start)
        self._next = (start + n) % len(self.rows)
        return n

    def _chosen(self, step: int, course: int) -> tuple[Tensor, Tensor | None]:
        """The rows of a step's batch, and which are mirrored."""
        epoch, position = divmod(step, self.per_epoch)
        chosen = slice(position * self.batch_size, (position + 1) * self.batch_size)
        order, mirrored = self._drawn(epoch, course)
        return order[chosen], None if mirrored is None else mirrored[chosen]

    def take(self, n: int, out: Tensor | None = None) -> Tensor:
        """The next n images (n, C, H, W) in [-1, 1]: float32, or to `out`, channels_last, of its type."""
        batch = self._gather(
            self.rows, self.permutation, self.cursor, n, self.mirrored,
            torch.float32 if out is None else out.dtype,
            out=None if out is None else out.permute(0, 2, 3, 1),
        ).permute(0, 3, 1, 2)  # fmt: skip
        return batch if out is not None else batch.contiguous(memory_format=self.memory_format)

    def __call__(self, step: int, course: int = 0) -> Tensor:
        """The batch of training step `step`; see `seek`, `take`."""
        return self.take(self.seek(step, course))


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
