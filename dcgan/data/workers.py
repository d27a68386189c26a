"""Pictures decoded in worker processes, in order.

Measured on two cores, JPEGs of 64×64: one thread 6,800 pictures/s, two to four 4,000 to 5,000, because Pillow's Python
half holds the interpreter's lock, and handing it over costs more than the other half gains; two of these workers 8,400
from a zip, the writing of the cache included.

They are plain programs that talk over pipes, not multiprocessing's: a spawned child imports the caller's main module
and with it torch, a forked one inherits its threads, locks and signal handlers, and either may outlive a killed parent.
These see the end of their input and leave; Ctrl-C does not reach them; and one that crashes on a picture is replaced.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from dcgan.data import decode

BATCH = 32  # pictures a request
SERIAL = 600  # up to as many pictures no worker is worth its start, a tenth of a second
MOST = 32  # workers

Result = tuple[list[str], bytes]
"""For each picture of a batch "" or the reason why it was skipped; the pixels of those that were not."""


class Worker:
    """One decoding process; `arguments` are those of `decode.serve` after the pipes. Raises OSError: none starts."""

    def __init__(self, arguments: list):
        self.arguments = arguments
        self.closed = False
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-P", "-W", "ignore", decode.__file__, json.dumps(self.arguments)]
        # A session of its own: a terminal's Ctrl-C goes only to the parent, which then closes the worker. No stderr:
        # libtiff writes a line there for each damaged row.
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True)

    def _stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                pipe.close()

    def wait(self) -> None:
        """Until it is ready. Raises OSError where it never will be."""
        if self.process.stdout.readline() != b"ready\n":
            raise OSError("a decoding worker did not start")

    def close(self) -> None:
        self.closed = True
        self._stop()

    def _ask(self, locations: list[decode.Location]) -> Result:
        self.process.stdin.write(json.dumps(locations).encode() + b"\n")
        self.process.stdin.flush()
        reasons, size = json.loads(self.process.stdout.readline())
        pixels = self.process.stdout.read(size)
        if len(pixels) < size:
            raise EOFError
        return reasons, pixels

    def ask(self, locations: list[decode.Location]) -> Result:
        """The pictures of one batch. A worker that dies is replaced, and the picture it died of is skipped."""
        try:
            return self._ask(locations)
        except (OSError, EOFError, ValueError):  # ValueError: no line is no JSON
            self._stop()
        if not self.closed:
            self._start()
            self.wait()
        if self.closed:  # perhaps while it was starting
            self._stop()
            raise EOFError
        if len(locations) == 1:
            return ["the decoder crashed on it"], b""
        results = [self.ask([location]) for location in locations]
        return [reasons[0] for reasons, _ in results], b"".join(pixels for _, pixels in results)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serial(batches: list[list[decode.Location]], archive: str | None, size: int, channels: int) -> Iterator[Result]:
    reader = decode.Reader(archive)
    try:
        for batch in batches:
            yield decode.decode_all(reader, batch, size, channels)
    finally:
        reader.close()


def decode_in_order(
    locations: list[decode.Location], archive: str | None, size: int, channels: int
) -> Iterator[Result]:
    """Decode pictures batch by batch, on every core where that pays.

    Args:
        locations: where the pictures are; `archive` is the zip that they lie in, if they do.
        size: height and width of the result, in pixels.
        channels: 1, 3 or 4.
    """
    batches = [locations[i : i + BATCH] for i in range(0, len(locations), BATCH)]
    count = min(cores(), len(batches), MOST)
    workers: list[Worker] = []
    try:
        if count > 1 and len(locations) > SERIAL:
            for _ in range(count):
                workers.append(Worker([archive, size, channels]))
            for worker in workers:
                worker.wait()
    except OSError:  # no interpreter to start, no processes left: the pictures can still be decoded here
        for worker in workers:
            worker.close()
        workers = []
    if not workers:
        yield from _serial(batches, archive, size, channels)
        return

    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def ask(batch: list[decode.Location]) -> Result:
        worker = idle.get()
        try:
            return worker.ask(batch)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(count)
    pending: deque = deque()
    try:
        for batch in batches:
            pending.append(threads.submit(ask, batch))
            if len(pending) > 4 * count:  # bounds the memory where the disk is slower than the decoders
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for worker in workers:
            worker.close()
        threads.shutdown(cancel_futures=True)
