"""Pictures that do not fit on the device: two batches of room on it, one filled while the step reads the other.

Host memory map → pinned memory (a thread) → the device (a stream of its own) → the step's gather. Each hand-over is an
event, so the host waits for the device nowhere but where it is two batches ahead of it.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

Chosen = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""From a step and a course of the data to the rows of its batch, and which of them are mirrored."""


def send(values: Tensor, into: Tensor) -> None:
    """Copy a host tensor to a device's without waiting for the device."""
    into.copy_(values.pin_memory() if into.is_cuda else values, non_blocking=into.is_cuda)


class Slot:
    """One batch of room: the rows on the device, the pinned memory they pass through, and who may touch which."""

    def __init__(self, rows: Tensor):
        self.rows, self.on_gpu = rows, rows.is_cuda
        self.staging = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True) if self.on_gpu else rows
        self.sent, self.read = (torch.cuda.Event() if self.on_gpu else None for _ in range(2))
        self.filling: Future | None = None
        self.what: tuple[int, int] | None = None  # step and course

    def fill(self, images: np.ndarray, chosen: "Chosen", stream: "torch.cuda.Stream | None") -> None:
        """On the thread: read the rows and send them, once the step before has read the room."""
        rows = chosen(*self.what)[0].numpy()  # which may draw a whole epoch's order
        n = len(rows)
        if self.on_gpu:
            self.sent.synchronize()  # the staging memory is still being sent from
        np.take(images, rows, axis=0, out=self.staging[:n].numpy(), mode="clip")  # other modes read twice
        if self.on_gpu:
            with torch.cuda.stream(stream):
                stream.wait_event(self.read)
                self.rows[:n].copy_(self.staging[:n], non_blocking=True)
                self.sent.record(stream)


class Ring:
    """Two slots, taken in turn.

    Args:
        images: uint8 (N, H, W, C), in memory or mapped.
        batch_size: rows of a slot.
        device: where the slots are.
    """

    def __init__(self, images: np.ndarray, batch_size: int, device: torch.device):
        self.images, self.batch_size = images, batch_size
        self.rows = torch.empty((2 * batch_size, *images.shape[1:]), dtype=torch.uint8, device=device)
        self.slots = [Slot(rows) for rows in self.rows.chunk(2)]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self.waited_s = 0.0
        """Seconds that the host stood still because pictures were not read yet."""

    def turn(
        self,
        step: int,
        course: int,
        chosen: Chosen,
        mirrored: Tensor | None,
    ) -> int:
        """Have the batch of `step` in its slot, as far as work queued on the current stream can tell, and begin the
        next one's; all that read the other slot must be queued by now.

        Args:
            step, course: which batch.
            chosen: the rows of a batch, and which are mirrored.
            mirrored: the device's (2·batch_size,) uint8, to be set for this batch.

        Returns:
            The slot's first row.
        """
        here, other = self.slots[step % 2], self.slots[(step + 1) % 2]
        if here.what != (step, course):
            self._begin(here, step, course, chosen)
        began = time.perf_counter()
        here.filling.result()
        self.waited_s += time.perf_counter() - began
        first = step % 2 * self.batch_size
        if mirrored is not None:
            flips = chosen(step, course)[1]
            send(flips, mirrored[first : first + len(flips)])
        if here.on_gpu:
            torch.cuda.current_stream(self.rows.device).wait_event(here.sent)
        self._begin(other, step + 1, course, chosen)
        return first

    def _begin(self, slot: Slot, step: int, course: int, chosen: Chosen) -> None:
        if slot.filling is not None:
            slot.filling.exception()  # a batch that nobody took is still on its way
        if slot.on_gpu:
            slot.read.record(torch.cuda.current_stream(self.rows.device))
        slot.what = (step, course)
        slot.filling = self.thread.submit(slot.fill, self.images, chosen, self.stream)
