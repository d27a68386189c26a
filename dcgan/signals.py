"""Stop at a signal, after the step in progress and a checkpoint; stop at once at the second."""

import os
import signal

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class StopOnSignal:
    """A context in which `number` becomes the first signal received, and a second one ends the process.

    Exit code of both: 128 + the signal's number. Signals that the process was started to ignore (nohup) stay ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, object] = {}

    def _receive(self, number: int, frame: object) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def __enter__(self) -> "StopOnSignal":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
