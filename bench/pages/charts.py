"""The page's plots: single kernels under the roofline, scaling, and the profile; empty where no record has rows."""

from bench.pages import plots
from bench.pages.plots import Series, plot
from bench.pages.records import Record, significant
from bench.pages.sections import Row, cell, latest, percent, source, timed, times
from dcgan.arch import PRESETS
from dcgan.curves import number

RECIPES = ("triton", "cuda", "library", "eager")
KINDS = ("the example", "fused", "the best peer")
AXES = {"batch": "images a step", "image size": "pixels", "width": "filters next to the image"}
LONGEST = 12
"""Rows of a list of what is left."""


def roofline(entries: list[Record]) -> str:
    """A plot a precision: operations a byte against TFLOP/s, under what the same run measured as ceilings."""

    def wanted(row: Row) -> bool:
        return row.get("suite") == "ops" and row.get("ok") is True and bool(number(row.get("p50_ms")))

    found = latest(entries, wanted)
    if found is None:
        return ""
    entry, rows = found
    copy = next((row["copy_tbps"] for row in entry.rows if number(row.get("copy_tbps"))), None)
    charts = []
    products = [row for row in rows if all(number(row.get(key)) for key in ("tflops", "gbps"))]
    for precision in dict.fromkeys(str(row.get("precision")) for row in products):
        here = [row for row in products if str(row.get("precision")) == precision]
        product = "bf16" if precision == "fp16" else precision
        rate = next((r["matrix_tflops"] for r in entry.rows if r.get("name") == f"matrix product {product}"), None)
        series = []
        for recipe in dict.fromkeys(str(row.get("recipe")) for row in here):
            points = [
                (1e3 * row["tflops"] / row["gbps"], row["tflops"], op_text(row)) for row in here
                if str(row.get("recipe")) == recipe
            ]  # fmt: skip
            series.append(Series(recipe, points, RECIPES.index(recipe) if recipe in RECIPES else len(RECIPES) - 1))
        roof = (lambda x, copy=copy, rate=rate: min(rate, copy * x)) if rate and copy else None
        named = f"{significant(rate)} TFLOP/s, {significant(copy)} TB/s" if roof else ""
        charts.append(plot(precision, series, "operations a byte", "TFLOP/s", roofs=roof, roof_name=named))
    left = [row for row in rows if row.get("ours") and number(row.get("floor_ms"))]
    left = sorted(left, key=lambda row: row["floor_ms"] - row["p50_ms"])[:LONGEST]
    longest = max((row["p50_ms"] for row in left), default=0.0)
    lines = [
        [plots.breakable(row["name"]), bar_over_floor(row["p50_ms"], row["floor_ms"], longest), cell(row["p50_ms"]),
         cell(row["floor_ms"]), cell(row.get("roofline"), percent), cell(row.get("over_library"), times)]
        for row in left
    ]  # fmt: skip
    head = ("kernel", "floor in time", "p50, ms", "floor, ms", "of the floor", "over the library")
    rest = plots.table(head, lines, "Ours, farthest from the floor first") if lines else ""
    return f'{source(entry)}<div class="charts">{"".join(charts)}</div>{rest}'


def op_text(row: Row) -> str:
    floor = number(row.get("roofline"))
    share = "" if floor is None else f", {floor:.0%} of its floor"
    return f"{row['name']}: {significant(row['tflops'])} TFLOP/s, {significant(row['gbps'])} GB/s{share}"


def bar_over_floor(ms: float, floor_ms: float, largest: float) -> str:
    return plots.bar(floor_ms, largest, f"{significant(ms)} ms, floor {significant(floor_ms)} ms", 2, back=ms)


def dimensions(row: Row, entry: Record) -> dict[str, float]:
    """Batch, image size and width of a step's row: its own, or its preset's."""
    preset = PRESETS.get(str(row.get("preset") or entry.preset))
    size = number(row.get("image_size")) or (preset.arch.image_size if preset else 0)
    width = number(row.get("ngf")) or number(row.get("width")) or (preset.arch.ngf if preset else 0)
    return {"batch": row["batch"], "image size": size, "width": width}


def kind_of(row: Row) -> str | None:
    """Which of `KINDS`; None for ours that are not fused."""
    if row["name"] == "example":
        return KINDS[0]
    ours = row.get("ours")
    return KINDS[2] if not ours else KINDS[1] if ours == "fused" else None


def scaling(entries: list[Record]) -> str:
    """Images a second over batch, size and width, the other two held where most was measured."""
    charts, shown = {}, None
    for axis, x_name in AXES.items():
        for entry in entries:
            held, rows = widest(entry, axis)
            values = sorted({x for _, x in rows})
            if len(values) < 2:
                continue
            series = [Series(kind, look=look, joined=True) for look, kind in enumerate(KINDS)]
            for (kind, x), row in rows.items():
                series[KINDS.index(kind)].points.append((x, 1e3 * row["batch"] / row["p50_ms"], step_text(row)))
            fixed = ", ".join(f"{name} {value:g}" for name, value in held)
            charts[axis] = plot(f"By {axis}, at {fixed}", series, x_name, "images/s", values)
            shown = shown or entry
            break
    if not shown:
        return ""
    lacking = [axis for axis in AXES if axis not in charts]
    note = f'<p class="soft">Not measured: scaling with {" and ".join(lacking)}.</p>' if lacking else ""
    return f'{source(shown)}<div class="charts">{"".join(charts.values())}</div>{note}'


def widest(entry: Record, axis: str) -> tuple[tuple, dict[tuple[str, float], Row]]:
    """The values that the other axes are held at where most of `axis` was measured, and the fastest row by kind and
    value."""
    best: dict[tuple, dict[tuple[str, float], Row]] = {}
    for row in filter(timed, entry.rows):
        at, kind = dimensions(row, entry), kind_of(row)
        if kind is None or not all(at.values()):
            continue
        rows = best.setdefault(tuple((name, value) for name, value in at.items() if name != axis), {})
        known = rows.get((kind, at[axis]))
        if known is None or row["p50_ms"] < known["p50_ms"]:
            rows[kind, at[axis]] = row
    return max(best.items(), key=lambda item: len({x for _, x in item[1]}), default=((), {}))


def step_text(row: Row) -> str:
    return f"{row['name']}, batch {row['batch']}: {significant(1e3 * row['batch'] / row['p50_ms'])} images/s"


def profile(entries: list[Record]) -> str:
    """The layers of the profile beside their floors, what is left to gain first."""

    def wanted(row: Row) -> bool:
        return row.get("suite") == "profile" and all(number(row.get(key)) is not None for key in ("ms", "floor_ms"))

    found = latest(entries, wanted)
    if found is None:
        return ""
    entry, rows = found
    rows = sorted(rows, key=lambda row: row["floor_ms"] - row["ms"])
    longest = max(row["ms"] for row in rows)
    lines = [
        [plots.breakable(row["name"]), bar_over_floor(row["ms"], row["floor_ms"], longest), cell(row["ms"]),
         cell(row["floor_ms"]), cell(row["ms"] - row["floor_ms"])]
        for row in rows
    ]  # fmt: skip
    what = f"{rows[0].get('rung')}, batch {rows[0].get('batch')}; the darker part of a bar is the floor"
    if any(row["ms"] < row["floor_ms"] for row in rows):
        what += ", which fewer multiplications than it counts can beat"
    return source(entry) + plots.table(("layer", "floor in time", "ms", "floor, ms", "left, ms"), lines, what)
