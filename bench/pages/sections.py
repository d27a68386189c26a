"""The page's sections in words and tables, each from the newest record that has rows for it; empty where none has."""

from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from bench.pages import plots
from bench.pages.records import Record, over_best_noisy, significant
from bench.samples.judge import MEASURES
from dcgan.curves import number

Row = dict[str, Any]


def source(entry: Record) -> str:
    """The line that says which record a section shows."""
    environment = entry.environment
    versions = [f"torch {environment.get('torch')}", f"Triton {environment.get('triton')}"]
    if not environment.get("gpu"):
        versions.insert(0, f"threads: {environment['threads']}")
    load = number(environment.get("load_average"))
    versions += [f"load average {load:.2f} at its start"] if load is not None else []
    text = f"{entry.date}, {entry.commit}, {entry.preset}, {', '.join(versions)}"
    return f'<p class="soft">{link(entry)}: {escape(text)}</p>'


def link(entry: Record) -> str:
    folder = entry.folder
    return f'<a href="{escape(f"{folder.parent.name}/{folder.name}/README.md")}">{escape(folder.name)}</a>'


def latest(entries: list[Record], wanted: Callable[[Row], bool]) -> tuple[Record, list[Row]] | None:
    """The newest record with rows that are `wanted`, and these."""
    for entry in entries:
        if rows := [row for row in entry.rows if wanted(row)]:
            return entry, rows
    return None


def timed(row: Row) -> bool:
    """Whether a row is of a whole step, nothing of it turned off, verified and timed."""
    figures = (number(row.get(key)) for key in ("batch", "p50_ms"))
    step = row.get("suite") in ("peers", "step") and row.get("group") != "sampling" and not row.get("off")
    return step and row.get("ok") is True and all(figures)


def cell(value: object, form: Callable[[float], str] = significant) -> str:
    found = number(value)
    return "–" if found is None else escape(form(found))


def percent(value: float) -> str:
    return f"{value:.0%}"


def times(value: float) -> str:
    return f"{significant(value)}×"


def headline(entries: list[Record]) -> str:
    entry = next((entry for entry in entries if entry.batches()), None)
    if entry is None:
        return ""
    head = ("batch", "step, ms", "images/s", "of the floor", "over the example", "over the best peer", "memory", "what")
    rows = []
    for batch, figures in entry.batches():
        noisy = " (noisy)" if figures.get("noisy") else ""
        peer = f" ({escape(figures['best_peer'])})" if figures.get("best_peer") else ""
        cells = [str(batch), cell(figures.get("step_ms")), cell(figures.get("images_per_s"))]
        cells += [cell(figures.get("roofline"), percent), cell(figures.get("over_example"), times) + noisy]
        unsure = " (noisy)" if over_best_noisy(figures) else ""
        cells += [cell(figures.get("over_best_peer"), times) + peer + unsure]
        cells += [cell(figures.get("peak_memory_over_example"), percent), escape(figures.get("ours") or "–")]
        rows.append(cells)
    rate = number(entry.summary.get("sampling_images_per_s"))
    samples = f"<p>Sampling alone: {significant(rate)} images/s.</p>" if rate else ""
    return source(entry) + plots.table(head, rows) + samples


def parts_of(name: str) -> frozenset[str]:
    return frozenset(name.split("+"))


def before(row: Row, others: Iterable[Row]) -> Row | None:
    """The rung that `row` adds least to: of those whose parts are all in it, the one with most, then the fastest.

    Only within a group, whose rungs were timed beside each other.
    """
    own = parts_of(row["name"])
    inside = [other for other in others if parts_of(other["name"]) < own and other.get("group") == row.get("group")]
    return max(inside, key=lambda other: (len(parts_of(other["name"])), -other["p50_ms"]), default=None)


def ladder(entries: list[Record]) -> str:
    """A table a batch: every rung with its time and what it gains over the rung below."""
    found = latest(entries, lambda row: timed(row) and row["suite"] == "peers")
    if found is None:
        return ""
    entry, rows = found
    text = [source(entry)]
    head = ("rung", "images/s", "", "p50, ms", "p20 to p80", "of the floor", "over the example", "gain")
    for batch in sorted({row["batch"] for row in rows}):
        here = [row for row in rows if row["batch"] == batch]
        rungs = {row["name"]: row for row in reversed(here)}  # of several groups, the first
        largest = max(1e3 * batch / row["p50_ms"] for row in rungs.values())
        lines = []
        for row in sorted(rungs.values(), key=lambda row: -row["p50_ms"]):
            speed = 1e3 * batch / row["p50_ms"]
            below = before(row, here)
            gain = (
                ""
                if below is None
                else f"{times(below['p50_ms'] / row['p50_ms'])} over {plots.breakable(below['name'])}"
            )
            noisy = " (noisy)" if row.get("noisy") else ""
            says = f"{row['name']}: {significant(speed)} images/s"
            lines.append([
                plots.breakable(row["name"]), plots.bar(speed, largest, says, 1 if row.get("ours") else 0), cell(speed),
                cell(row["p50_ms"]), f"{cell(row.get('p20_ms'))} to {cell(row.get('p80_ms'))}",
                cell(row.get("roofline"), percent), cell(row.get("over_example"), times) + noisy, gain,
            ])  # fmt: skip
        text.append(plots.table(head, lines, f"batch {batch}; ours in the second colour"))
    others = [row for row in entry.rows if row.get("suite") == "peers" and row.get("ok") is not True]
    reasons = list(dict.fromkeys((row["name"], str(row.get("why"))) for row in others))
    if reasons:
        lines = [[plots.breakable(name), escape(why)] for name, why in reasons]
        text.append(f"<details><summary>{len(reasons)} without a time</summary>{plots.table(('rung', 'why'), lines)}")
        text.append("</details>")
    return "\n".join(text)


def ablation(entries: list[Record]) -> str:
    """What each part of the fused step saves: a table a batch of the step with it turned off."""
    found = latest(entries, lambda row: bool(row.get("off")) and number(row.get("gain")) is not None)
    if found is None:
        return ""
    entry, rows = found
    text = [source(entry)]
    for batch in sorted({row["batch"] for row in rows}):
        here = sorted((row for row in rows if row["batch"] == batch), key=lambda row: -row["gain"])
        lines = []
        for row in here:
            spread = f"{cell(row.get('gain_p20'), times)} to {cell(row.get('gain_p80'), times)}"
            noisy = " (noisy)" if row.get("noisy") else ""
            lines.append([escape(row["off"]), cell(row["p50_ms"]), cell(row["gain"], times) + noisy, spread])
        text.append(plots.table(("without", "p50, ms", "times as long", "p20 to p80"), lines, f"batch {batch}"))
    others = [row for row in entry.rows if row.get("off") and row.get("ok") is not True]
    text += [
        f"<p>Without {escape(row['off'])}, batch {row['batch']}: {escape(str(row.get('why')))}</p>" for row in others
    ]
    return "\n".join(text)


def quantity(entries: list[Record], key: str, factor: float, unit: str) -> str:
    """A figure of whole steps, as bars, a table a batch."""

    def wanted(row: Row) -> bool:
        return timed(row) and row.get("group") != "scaling" and number(row.get(key)) is not None

    found = latest(entries, wanted)
    if found is None:
        return ""
    entry, rows = found
    text = [source(entry)]
    for batch in sorted({row["batch"] for row in rows}):
        here = {row["name"]: row for row in rows if row["batch"] == batch}
        largest = max(row[key] for row in here.values())
        lines = []
        for row in sorted(here.values(), key=lambda row: -row[key]):
            amount = f"{significant(row[key] * factor)} {unit}"
            look = 1 if row.get("ours") else 0
            lines.append(
                [plots.breakable(row["name"]), plots.bar(row[key], largest, f"{row['name']}: {amount}", look), amount]
            )
        text.append(plots.table(("rung", "", unit), lines, f"batch {batch}"))
    return "\n".join(text)


def samples(entries: list[Record]) -> str:
    found = latest(entries, lambda row: row.get("suite") == "quality" and row.get("measure") in MEASURES)
    if found is None:
        return ""
    entry, rows = found
    lines = []
    for row in rows:
        apart = number(row.get("difference_spreads"))
        outcome = str(row.get("verdict") or row.get("why") or "")
        lines.append([
            f"{row.get('step'):,}", MEASURES[row["measure"]], cell(row.get("eager")), cell(row.get("fused")),
            cell(row.get("spread")), "–" if apart is None else f"{apart:+.2f}", escape(outcome),
        ])  # fmt: skip
    head = ("step", "measure, more is worse", "eager fp32", "fused bf16", "spread", "difference, in spreads", "")
    return source(entry) + plots.table(head, lines, f"{rows[0].get('seeds')} seeds each; docs/quality.md")


def history(entries: list[Record]) -> str:
    head = ("record", "date", "commit", "rows", "stages")
    lines = [
        [link(entry), entry.date, escape(entry.commit), str(len(entry.rows)),
         escape(", ".join(dict.fromkeys(str(row.get("suite")) for row in entry.rows if row.get("ok") is not None)))]
        for entry in entries
    ]  # fmt: skip
    return plots.table(head, lines)
