"""Buffers that a training step keeps: each is asked for by name, grows to the largest size seen and is never freed.

On a CPU a fresh tensor of megabytes costs a page fault every 4 KiB, about 6 µs each on a virtual machine (16 MB: 24 ms,
several times the arithmetic on it), because the allocator hands large blocks back to the system when they are freed.
"""

from math import prod

import torch
from torch import Tensor

KEPT_BYTES = 31 << 20
"""A block that a process has freed once: from then on glibc keeps freed blocks up to that size, twice as many bytes of
them, instead of handing them back to the system (mallopt(3), the dynamic M_MMAP_THRESHOLD, at most 32 MiB). So what a
library allocates within a call costs no page faults either. It holds for the whole process from the first pool on."""


class Pool:
    """Named storage on one device.

    A buffer is zero when it is made and keeps what was written last. A smaller shape takes the front of the storage;
    as the batch is the outermost dimension in memory, the border that an earlier, larger batch left zero stays zero.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        if self.device.type == "cpu":
            torch.empty(KEPT_BYTES, dtype=torch.uint8, device=self.device)  # and freed
        self.storage: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The contiguous buffer `name` of `shape` and `dtype`; whoever takes it overwrites the previous owner's."""
        elements, key = prod(shape), (name, dtype)
        if key not in self.storage or self.storage[key].numel() < elements:
            self.storage[key] = torch.zeros(elements, dtype=dtype, device=self.device)
        return self.storage[key][:elements].view(shape)

    def images(self, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """The same for a (N, C, H, W) shape in channels_last memory."""
        n, c, h, w = shape
        return self.take(name, (n, h, w, c), dtype).permute(0, 3, 1, 2)
