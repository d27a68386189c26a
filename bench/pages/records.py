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
    found = []
    for path in sorted(results.glob("*/*/env.json")):
        try:
            environment = json.loads(path.read_text())
            summary = path.with_name("summary.json")
            lines = path.with_name("rows.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            environment["date"], environment["cpu"], environment["threads"]
            summary = json.loads(summary.read_text()) if summary.exists() else {}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path.parent}: not a record ({type(error).__name__}: {error})") from error
        found.append(Record(path.parent, environment, summary, rows))
    return sorted(found, key=lambda entry: (entry.folder.parent.name, entry.environment["date"], entry.folder.name))


def newest(found: list[Record]) -> list[Record]:
    """Each machine's newest record among those that measured the step."""
    return list({entry.folder.parent.name: entry for entry in found if entry.batches()}.values())


def significant(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, in thousands with commas, never in powers of ten."""
    decimals = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits
    return f"{value:,.{decimals}f}"
