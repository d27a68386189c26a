"""Choosing among candidates, and the tuned table that the choices go to. No device here: a `Lab` has it.

The order is the promise: a candidate is compiled, then checked, and only then timed; what was wrong once is never
timed and so cannot be chosen.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.subjects.problems import Read

LIBRARY, EXTENSION = "library", "cuda"
"""Recipes that are no tile of Triton's; the extension's name starts those of its tiles, too."""
FINALISTS = 4
ROUNDS = {"first": 3, "last": 15}
"""Of the timing: of every right candidate, and of the finalists beside the library."""


class Lab(Protocol):
    """What a search asks of a device, for one shape at a time; recipes are names of candidates, `library` or `cuda`."""

    def check(self, recipe: str) -> str | None:
        """Why what the recipe computes is wrong; None if it is right."""

    def time_us(self, recipes: Sequence[str], rounds: int) -> Mapping[str, float]:
        """Microseconds of each, taken beside each other."""


@dataclass
class Choice:
    """What a search came to.

    recipe: the fastest right one; None if none is right. us: its time; `library_us` and `cuda_us` those of the
    library and the extension, where they ran. rejected: why others were not timed, by name. timed: how many were.
    """

    recipe: str | None
    us: float | None = None
    library_us: float | None = None
    cuda_us: float | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    timed: int = 0


def search(
    recipes: Sequence[str], lab: Lab, faults: Mapping[str, str] | None = None, others: Sequence[str] = (LIBRARY,)
) -> Choice:
    """The fastest of `recipes` and `others` that computes the right thing.

    Args:
        recipes: candidates by name, the default first: it is always among the finalists.
        faults: why some may not ship, as their compilation said: these are not run at all.
        others: always among the finalists: the library, and the extension where it can.
    """
    choice = Choice(None, rejected=dict(faults or {}))
    right = []
    for recipe in [*recipes, *others]:
        if recipe in choice.rejected:
            continue
        why = lab.check(recipe)
        if why:
            choice.rejected[recipe] = why
        else:
            right.append(recipe)
    choice.timed = len(right)
    if not right:
        return choice
    first = lab.time_us(right, ROUNDS["first"])
    best = sorted((recipe for recipe in right if recipe not in others), key=lambda recipe: first[recipe])[:FINALISTS]
    always = [recipe for recipe in (recipes[0], *others) if recipe in right and recipe not in best]
    last = lab.time_us([*best, *always], ROUNDS["last"])
    choice.recipe = min(last, key=lambda recipe: last[recipe])
    choice.us, choice.library_us = last[choice.recipe], last.get(LIBRARY)
    choice.cuda_us = min((us for recipe, us in last.items() if recipe.startswith(EXTENSION)), default=None)
    return choice


class Table:
    """A tuned table on its way to a file; the format is that of `kernels.tuning`, and `measured` beside it: by the name
    of an input's entry its times in µs, and of what kernels and tiles.

    Args:
        path: of the file; what it holds stays, but for what is measured again.
        header: `device`, `torch`, `triton`, `kernels_hash` and `record` of this run.
        sources: what its tiles are measured from, a hash; it stands in each of them.

    Raises:
        ValueError: the file is of another device, or not a table.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], sources: str):
        self.path, self.header, self.sources = path, dict(header), sources
        self.data: dict[str, Any] = {"ops": {}, "tiles": {}, "inputs": {}, "launch": {}, "measured": {}}
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(held, dict) or held.get("device") != header["device"]:
                raise ValueError(f"{path} is not a tuned table of {header['device']}")
            self.data |= {section: held.get(section, {}) for section in self.data}

    def has(self, kernel: str, key: str, precision: str, images: int) -> bool:
        """Whether a tile was measured from these very sources."""
        entry = self.data["tiles"].get(kernel, {}).get(key, {}).get(precision, {}).get(str(images), {})
        return entry.get("sources") == self.sources

    def put_tile(
        self, kernel: str, key: str, precision: str, images: int, choice: Choice, tile: Any
    ) -> dict[str, Any]:  # fmt: skip
        """Store a search's choice, and write. `tile` is its configuration, None for a recipe without one."""
        name = choice.recipe.split()[0]
        entry: dict[str, Any] = {"recipe": name if name in (LIBRARY, EXTENSION) else "triton"}
        if tile is not None:
            entry["tile"] = asdict(tile)
        entry |= {"us": choice.us, "library_us": choice.library_us, "cuda_us": choice.cuda_us, "sources": self.sources}
        place = self.data["tiles"].setdefault(kernel, {}).setdefault(key, {}).setdefault(precision, {})
        place[str(images)] = entry
        self.write()
        return entry

    def put_op(self, op: str, key: str, precision: str, images: int, recipe: str) -> None:
        """Store which recipe is the fastest for a public op as a whole, and write."""
        self.data["ops"].setdefault(op, {}).setdefault(key, {}).setdefault(precision, {})[str(images)] = recipe
        self.write()

    def has_measured(self, name: str, stamp: str) -> bool:
        """Whether an input, or a step, was measured with these very kernels and tiles, of which `stamp` is a hash."""
        return self.data["measured"].get(name, {}).get("sources") == stamp

    def put_input(self, read: Read, way: str, times: Mapping[str, float], stamp: str) -> None:
        """Store who should apply the batch norm of a layer's input, `applied` or `deferred`, and write."""
        place = self.data["inputs"].setdefault(read.kind, {}).setdefault(read.key, {})
        place.setdefault(read.precision, {})[str(read.images)] = way
        self.data["measured"][read.name] = {"us": dict(times), "sources": stamp}
        self.write()

    def put_launch(self, name: str, precision: str, images: int, way: str, times: Mapping[str, float]) -> None:
        """Store how a step's kernels should be launched, `plain` or `dependent`, and write."""
        place = self.data["launch"].setdefault("step", {}).setdefault("any", {}).setdefault(precision, {})
        place[str(images)] = way
        self.data["measured"][name] = {"us": dict(times), "sources": self.sources}
        self.write()

    def write(self) -> None:
        """To a file beside it first and then in one move, so that whoever reads finds the old table or the new."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(self.header | self.data, file, indent=1, sort_keys=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)


class Journal:
    """Which candidate is being run, on disk, so that one that takes the process with it is not run again.

    Args:
        path: a line a candidate that was begun, `+ name`, and one for each that came back, `- name`; nothing is kept
            where None.
    """

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        begun = [line[2:] for line in lines if line.startswith("+ ")]
        back = {line[2:] for line in lines if line.startswith("- ")}
        self.blamed = {name for name in begun if name not in back}

    def begin(self, name: str) -> None:
        self._write(f"+ {name}")

    def end(self, name: str) -> None:
        self._write(f"- {name}")

    def _write(self, line: str) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """The search is over: whatever is blamed may be tried again by the next."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
