"""What stands under `bench/results`, read: every record, each machine's newest, and how their figures are written."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgan.errors import InputError

DEFAULT_PRESET = "dcgan64"


@dataclass(frozen=True)
class Record:
    """One folder under `bench/results/<machine>/`."""

    folder: Path
    environment: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def machine(self) -> str:
        """The GPU, or the CPU and how many of its cores took part."""
        if self.environment.get("gpu"):
            return self.environment["gpu"]
        return f"{self.environment['cpu']}, {self.environment['threads']} threads"

    @property
    def commit(self) -> str:
        """The first eight digits, and + where the tree had changes."""
        return (self.environment.get("commit") or "unknown")[:8] + ("+" if self.environment.get("dirty") else "")

    @property
    def date(self) -> str:
        """The day, as YYYY-MM-DD."""
        return self.environment["date"][:10]

    @property
    def preset(self) -> str:
        return self.summary.get("preset") or self.environment.get("preset") or DEFAULT_PRESET

    def batches(self) -> list[tuple[int, dict[str, Any]]]:
        """The summary's entries by batch, the smallest first."""
        keys = [key for key in self.summary if re.fullmatch(r"b\d+", key)]
        return sorted((int(key[1:]), self.summary[key]) for key in keys)


def records(results: Path) -> list[Record]:
    """All records under `results`, by machine and date.

    Raises:
        InputError: a record that cannot be read.
    """
    folders = {path.parent for name in ("env.json", "rows.jsonl") for path in results.glob(f"*/*/{name}")}
    return sorted(map(read, folders), key=lambda r: (r.folder.parent.name, r.environment["date"], r.folder.name))


def read(folder: Path) -> Record:
    """One record.

    Raises:
        InputError: as `records`.
    """
    try:
        environment = json.loads((folder / "env.json").read_text())
        summary = folder / "summary.json"
        summary = json.loads(summary.read_text()) if summary.exists() else {}
        rows = []
        for number, line in enumerate((folder / "rows.jsonl").read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} of rows.jsonl: {error}") from None
        if not all(isinstance(part, dict) for part in (environment, summary, *rows)):
            raise ValueError("env.json, summary.json and each line of rows.jsonl must be an object")
        for key, kind in (("date", str), ("cpu", str), ("threads", int)):
            if not isinstance(environment[key], kind):
                raise ValueError(f"env.json: {key} is {environment[key]!r}")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{folder}: not a record ({type(error).__name__}: {error})") from error
    return Record(folder, environment, summary, rows)


def over_best_noisy(figures: dict[str, Any]) -> bool:
    """Whether a batch's `over_best_peer` is of a machine too noisy to tell; where a record has no verdict on that
    ratio, the one on the ratio to the example, which was taken in the same rounds."""
    known = figures.get("best_peer_noisy")
    return figures.get("over_best_peer") is not None and bool(figures.get("noisy") if known is None else known)


def newest(found: list[Record]) -> list[Record]:
    """Each machine's newest record among those that measured the step."""
    return list({entry.folder.parent.name: entry for entry in found if entry.batches()}.values())


def significant(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, in thousands with commas, never in powers of ten."""
    decimals = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits
    return f"{value:,.{decimals}f}"
