"""How long a run has trained, and how fast."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Training time in seconds and images per second, with samples and checkpoints left out."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device, self.images = device, 0
        self._before, self._since, self._lap = seconds, None, seconds

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._before, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    def lap(self) -> float:
        """Images per second since the last call, or since the start."""
        seconds = self.seconds
        rate = self.images / max(seconds - self._lap, 1e-9)
        self._lap, self.images = seconds, 0
        return rate
