"""What a run says while it trains: the lines of metrics.jsonl, and the bar or the plain lines that a person watches."""

import contextlib
import json
import math
import numbers
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from dcgan.errors import InputError

FIELDS = (
    "step",
    "epoch",
    "loss_d",
    "loss_g",
    "d_real",
    "d_fake_before",
    "d_fake_after",
    "images_per_s",
    "seconds",
)
"""The keys of a line. Losses, probabilities and speed are means since the line before; `seconds` is the training time
since the run began, earlier sittings included; `epoch` is a fraction: 2.5 is half-way through the third."""

MAX_PENDING = 10_000  # lines kept while the disk is full: about 2 MB


def _parse(line: bytes) -> dict | None:
    """One line, or None if it is torn or not a line of metrics. A NaN that someone else wrote is read as null."""
    try:
        value = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def read(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, oldest first.

    What is not a whole line (the end of a file whose writer was killed) is passed over; no file is no lines.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return [line for line in map(_parse, content.split(b"\n")) if line is not None]


class MetricsLog:
    """Appends lines to metrics.jsonl, and to TensorBoard if asked.

    A line reaches the operating system before `append` returns, so a killed run keeps it. A disk that is full costs one
    warning; the lines wait in memory and are written with the next one.

    Args:
        path: the file; it is made by the first line, its folder must be there.
        tensorboard: folder for TensorBoard's event files, or None.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, path: str | Path, tensorboard: str | Path | None = None):
        self.path, self.tensorboard = Path(path), tensorboard
        self._pending: list[dict] = []
        self._warned = False
        self._writer = self._open_writer() if tensorboard else None

    def append(self, line: Mapping[str, float | None]) -> None:
        """Append one line. `line` holds numbers of the host, `step` among them; the keys of `FIELDS` are written first,
        others after them. NaN (a probability that was not looked at) and infinity become null: JSON has neither.
        """
        keys = [*(key for key in FIELDS if key in line), *(key for key in line if key not in FIELDS)]
        self._pending.append({"step": line["step"], **{key: _finite(line[key]) for key in keys}})
        del self._pending[:-MAX_PENDING]
        text = "".join(json.dumps(pending, allow_nan=False) + "\n" for pending in self._pending)
        try:
            _append(self.path, text.encode())
        except OSError as error:
            self._warn(f"{self.path} could not be written ({error}); training goes on, and the next line tries again")
        else:
            self._pending.clear()
        if self._writer is not None:
            self._mirror(line)

    def truncate_after(self, step: int) -> None:
        """Remove the lines whose step is greater, and what is no whole line: the run goes on from `step`.

        Raises:
            OSError: the file cannot be changed; it is as it was.
        """
        self._pending = [line for line in self._pending if line["step"] <= step]
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = [(line, _parse(line)) for line in content.split(b"\n")]
        kept = b"".join(line + b"\n" for line, values in lines if values is not None and values["step"] <= step)
        if kept != content:
            if content.startswith(kept):  # what goes is the end: one system call, which needs no space
                os.truncate(self.path, len(kept))
            else:
                _replace(self.path, kept)
        if self._writer is not None:
            self._writer.close()
            self._writer = self._open_writer(purge_step=step + 1)

    def close(self) -> None:
        """Write what TensorBoard still holds. metrics.jsonl needs none of this."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open_writer(self, purge_step: int | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"--tensorboard: {error}; install it with: pip install tensorboard") from None
        return SummaryWriter(str(self.tensorboard), purge_step=purge_step)

    def _mirror(self, line: Mapping[str, float | None]) -> None:
        try:
            for key, value in line.items():
                if key not in ("step", "seconds") and _finite(value) is not None:
                    self._writer.add_scalar(key, value, line["step"])
        except OSError as error:
            self._writer = None
            self._warn(f"TensorBoard's files could not be written ({error}); training goes on without them")

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        self._warned = True


def _finite(value: float | None) -> float | None:
    """A Python number, or None for what JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _append(path: Path, data: bytes) -> None:
    """Add lines to a file; after an error it has none of them. An end without newline is closed with one first."""
    with open(path, "a+b", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        if start:
            file.seek(start - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            while data:  # a disk that fills up takes a part, and refuses the rest
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def describe(line: Mapping[str, float | None]) -> str:
    """A line of metrics for people: `D 0.812  G 2.134  D(x) 0.71  D(G(z)) 0.24 → 0.19  12,345 images/s`."""

    def show(key: str, form: str) -> str:
        value = line.get(key)
        return "–" if value is None or not math.isfinite(value) else format(value, form)

    fake = show("d_fake_before", ".2f")
    if (after := show("d_fake_after", ".2f")) != "–":
        fake += f" → {after}"
    speed = show("images_per_s", ",.0f" if (line.get("images_per_s") or 0) >= 100 else ".1f")
    return (
        f"D {show('loss_d', '.3f')}  G {show('loss_g', '.3f')}  D(x) {show('d_real', '.2f')}  "
        f"D(G(z)) {fake}  {speed} images/s"
    )


def clock(seconds: float) -> str:
    """`7:05`, or `1:07:05` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A bar on a terminal; elsewhere a plain line for each line of metrics. Nothing here touches a device.

    Args:
        total: the step that the run ends at.
        initial: the step it begins at, more than 0 when resumed.
        per_epoch: steps in an epoch; with it a plain line says how many epochs there will be.
        stream: where to write; standard error if None. A stream that fails (a full disk, a lost terminal) is given up
            in silence: watching must not end what is watched.
    """

    def __init__(self, total: int, initial: int = 0, per_epoch: int | None = None, stream: TextIO | None = None):
        self.total, self.initial, self.current, self.per_epoch = total, initial, initial, per_epoch
        self.stream = sys.stderr if stream is None else stream
        self.began = time.perf_counter()
        self.bar = None
        if self.stream.isatty():
            from tqdm import tqdm

            form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {elapsed}<{remaining}  {desc}"
            self.bar = tqdm(total=total, initial=initial, file=self.stream, dynamic_ncols=True, bar_format=form)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Step `step` is done; a smaller one than before is a rollback."""
        moved, self.current = step - self.current, step
        if self.bar is None:
            return
        if moved >= 0:
            self._try(self.bar.update, moved)
        else:
            self.bar.n = step
            self._try(self.bar.refresh)

    def log(self, line: Mapping[str, float | None]) -> None:
        """Say the metrics of `line`, as they go to `MetricsLog.append`."""
        if self.bar is not None:
            self.bar.set_description_str(
                describe(line), refresh=False
            )  # drawn by the next step, ten times a second at most
            return
        step = int(line.get("step", self.current))
        elapsed = time.perf_counter() - self.began
        done = step - self.initial
        left = clock(elapsed / done * (self.total - step)) if done > 0 else "?"
        where = f"step {step:>{len(str(self.total))}}/{self.total}"
        if (epoch := line.get("epoch")) is not None:
            where += f"  epoch {epoch:.2f}" + (f"/{round(self.total / self.per_epoch, 2):g}" if self.per_epoch else "")
        self.message(f"{where}  {describe(line)}  {clock(elapsed)} gone, {left} left")

    def message(self, text: str) -> None:
        """A line of text, above the bar if there is one."""
        if self.bar is None:
            self._try(print, text, file=self.stream, flush=True)
        else:
            self._try(self.bar.write, text, file=self.stream)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self.bar is not None:
            self._try(self.bar.close)

    @staticmethod
    def _try(call, *args, **kwargs) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            call(*args, **kwargs)
