"""The README's measured table and the page of all records, both generated, and the check that both are up to date.

    python -m bench.report [--readme README.md] [--results bench/results] [--check]

Between `<!-- record: begin -->` and `<!-- record: end -->` stands a line for each batch in the summary of each
machine's newest record; `bench/results/report.html` is `bench.pages.page`. With `--check` nothing is written: exit code
3 where one of them is not what the records say, or where the README's prose has a figure with a unit of speed that no
record rounds to.
"""

import re
import sys
from pathlib import Path
from typing import Any

from bench import record
from bench.pages import page
from bench.pages.records import DEFAULT_PRESET, Record, newest, over_best_noisy, records, significant
from dcgan.errors import InputError, RunError, run_command
from dcgan.flags import Parser

BEGIN, END = "<!-- record: begin -->", "<!-- record: end -->"
COLUMNS = (
    "machine",
    "batch",
    "step",
    "images/s",
    "of the floor",
    "× the example",
    "× the best peer",
    "memory",
    "record",
)

FIGURE = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s?(ms|µs|images/s|×|TFLOP/s|GB/s|TB/s)(?![\w×])")
"""A number with a unit of speed, such as 1.5×, 12 ms or 4,000 images/s, but not the 64× of 64×64."""

UNITS = {  # unit → how the keys that hold such figures end, each with what to multiply a recorded value by
    "ms": (("_ms", 1.0), ("ms", 1.0)),
    "µs": (("_ms", 1e3), ("ms", 1e3)),
    "images/s": (("images_per_s", 1.0),),
    "×": (("over_example", 1.0), ("over_best_peer", 1.0), ("over_library", 1.0)),
    "TFLOP/s": (("tflops", 1.0),),
    "GB/s": (("_tbps", 1e3), ("gbps", 1.0)),
    "TB/s": (("_tbps", 1.0), ("gbps", 1e-3)),
}


def line(entry: Record, batch: int, figures: dict[str, Any], root: Path) -> str:
    """One row of the table; – where the record has no figure."""

    def cell(key: str, unit: str) -> str:
        value = figures.get(key)
        return "–" if value is None else f"{significant(value)}{unit}"

    def percent(key: str) -> str:
        value = figures.get(key)
        return "–" if value is None else f"{value:.0%}"

    over_best = cell("over_best_peer", "×")
    if figures.get("best_peer"):
        over_best += f" ({figures['best_peer']})"
    if over_best_noisy(figures):
        over_best += " (noisy)"
    over_example = cell("over_example", "×") + (" (noisy)" if figures.get("noisy") else "")
    where = entry.folder.relative_to(root) if entry.folder.is_relative_to(root) else entry.folder
    step = cell("step_ms", " ms") + (f" ({figures['ours']})" if figures.get("ours") else "")
    cells = [
        entry.machine,
        str(batch) if entry.preset == DEFAULT_PRESET else f"{batch}, {entry.preset}",
        step,
        cell("images_per_s", ""),
        percent("roofline"),
    ]
    cells += [over_example, over_best, percent("peak_memory_over_example")]
    cells += [f"[{entry.date}]({where.as_posix()}), {entry.commit}"]
    return f"| {' | '.join(cells)} |"


def table(found: list[Record], root: Path = record.ROOT) -> str:
    """The table of the newest records; empty where there is none."""
    lines = [line(entry, *batch, root) for entry in newest(found) for batch in entry.batches()]
    if not lines:
        return ""
    note = (
        "One training step of `--fused` (of `dcgan64` unless another preset is named), verified against the reference "
        "step, then timed beside PyTorch's DCGAN example and its faster variants in one process "
        "(on a CPU those by torch.compile only where a record was asked for them). The floor is "
        "`bench/roofline.py` at rates measured on the same machine; memory is the peak over the example's. "
        "`python -m bench.report` writes this table; docs/benchmarks.md says how the figures are made."
    )
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *lines, "", note, ""])


def split(readme: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the markers, which belong to the outer parts.

    Raises:
        InputError: the markers are not there once each, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise InputError(f"{name}: it needs the lines {BEGIN} and {END}, once each and in this order")
    before, rest = readme.split(BEGIN)
    between, after = rest.split(END)
    return before + BEGIN + "\n", between.removeprefix("\n"), END + after


def values(found: list[Record], unit: str) -> list[float]:
    """Every recorded figure of `unit`, in that unit."""
    every = [row for entry in found for row in [*entry.rows, *(figures for _, figures in entry.batches())]]
    return [
        value * factor
        for row in every
        for key, value in row.items()
        for ending, factor in UNITS[unit]
        if key.endswith(ending) and isinstance(value, int | float)
    ]


def unrecorded(prose: str, found: list[Record]) -> list[str]:
    """Figures with a unit of speed in `prose`, code blocks left out, that no record rounds to."""
    missing = []
    for match in FIGURE.finditer(re.sub(r"```.*?```", "", prose, flags=re.DOTALL)):
        written, unit = match.groups()
        decimals = len(written.partition(".")[2])
        if not any(f"{value:.{decimals}f}" == written.replace(",", "") for value in values(found, unit)):
            missing.append(match.group())
    return missing


def faults(readme: str, name: str, found: list[Record], root: Path = record.ROOT) -> list[str]:
    """What is wrong with the README, a line each."""
    before, between, after = split(readme, name)
    wrong = [] if between == table(found, root) else ["the table is stale: run python -m bench.report"]
    return wrong + [f"no record has {figure}" for figure in unrecorded(before + after, found)]


def command() -> int:
    parser = Parser(prog="python -m bench.report", description="Write the README's measured table from the records.")
    parser.add_argument("--readme", type=Path, default=record.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 3 where it is stale")
    args = parser.parse_args()
    try:
        readme = args.readme.read_text()
    except OSError as error:
        raise InputError(f"--readme {args.readme}: {error.strerror}") from error
    found = records(args.results)
    target = args.results / page.NAME
    rendered = page.render(found)
    if args.check:
        wrong = faults(readme, args.readme.name, found)
        if not target.exists() or target.read_text() != rendered:
            wrong.append(f"{page.NAME} is stale: run python -m bench.report")
        if wrong:
            raise RunError(f"{args.readme.name}: {'; '.join(wrong)}")
        return 0
    before, _, after = split(readme, args.readme.name)
    args.readme.write_text(before + table(found) + after)
    target.write_text(rendered)
    shown = newest(found)
    print(
        f"{args.readme.name}: {sum(len(entry.batches()) for entry in shown)} rows from {len(shown)} machines; {target}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
