"""A run's curves as inline SVG. The plot stretches with the page, the lines and the text beside it keep their size.

A curve of many lines is drawn from groups of them: thin, the smallest and the largest value of each group, so that no
spike is lost; thick, a moving median over a thirtieth of the run.
"""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from statistics import median

GROUPS = 300  # each gives at most two points to a curve
SMOOTH_FROM = 60  # groups; shorter curves are drawn as they are
SIZE = 1000  # of the plot, in its own units, both ways


def number(value: object) -> float | None:
    """What a file gives as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def decimals(value: float | None) -> str:
    """`0.812`, and `–` for what is not known."""
    return "–" if value is None else f"{value:.3f}"


def speed(value: float | None) -> str:
    """`12,345`, with a decimal below 100."""
    return "–" if value is None else f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


def scale(largest: float, intervals: int) -> tuple[float, list[float]]:
    """The end of an axis from 0, and its at most `intervals` + 1 ticks, by 1, 2, 2.5 or 5 times a power of ten."""
    if largest < 1e-9:
        largest = 1.0
    power = 10.0 ** math.floor(math.log10(largest / intervals))
    tick = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m * intervals >= largest * (1 - 1e-9))
    count = math.ceil(largest / tick - 1e-9)
    return tick * count, [tick * i for i in range(count + 1)]


def chart(
    title: str,
    series: Sequence[tuple[str, str]],
    lines: Sequence[dict],
    form: Callable[[float | None], str] = decimals,
    top: float | None = None,
    mark: float | None = None,
) -> str:
    """One plot over the steps, as HTML; empty where no line has a value.

    Args:
        title: above the plot.
        series: (key of a line, name in the legend), at most three; a series without any value is left out.
        lines: of metrics.jsonl, each with a `step`; a value that is null or missing leaves a gap.
        form: how a value is written.
        top: end of the y axis; by default just above the values, a few outliers excepted, which the legend then names.
        mark: a value to draw a dotted line at.
    """
    values = {key: [number(line.get(key)) for line in lines] for key, _ in series}
    shown = [(i, key, name) for i, (key, name) in enumerate(series) if any(v is not None for v in values[key])]
    if not shown:
        return ""
    everything = sorted(v for _, key, _ in shown for v in values[key] if v is not None)
    largest, typical = everything[-1], everything[int(0.98 * (len(everything) - 1))]
    clipped = top is None and len(everything) >= 50 and largest > 2 * typical > 0
    top, y_ticks = scale(top or (1.2 * typical if clipped else largest), 5)

    steps = [number(line["step"]) or 0 for line in lines]
    end = max(*steps, 1)
    size = math.ceil(len(lines) / GROUPS)
    starts = range(0, len(lines), size)
    centres = [steps[min(i + size // 2, len(steps) - 1)] for i in starts]
    x = [SIZE * max(step, 0) / end for step in centres]

    paths, legend, readout = [], [], []
    for i, key, name in shown:
        groups = [[v for v in values[key][start : start + size] if v is not None] for start in starts]
        smooth = len(groups) >= SMOOTH_FROM
        look = " raw" if smooth else " dot" if len(groups) == 1 else ""
        paths.append(f'<path class="s{i}{look}" d="{_path(x, groups, top)}"/>')
        if smooth:
            paths.append(f'<path class="s{i}" d="{_path(x, _moving_median(groups), top)}"/>')
        swatch = f'<svg viewBox="0 0 18 8" aria-hidden="true"><path class="s{i}" d="M1 4H17"/></svg>'
        legend.append(f"<li>{swatch}{escape(name)} <output>{form(values[key][-1])}</output></li>")
        readout.append([form(sum(group) / len(group) if group else None) for group in groups])
    if clipped:
        legend.append(f'<li class="soft">highest {form(largest)}, above the plot</li>')
    legend.append(f'<li class="at soft">step <output>{steps[-1]:,.0f}</output></li>')
    readout.append([f"{step:,.0f}" for step in centres])

    points = {"x": [round(v / SIZE, 4) for v in x], "text": readout}
    at_end = ", ".join(f"{name} {form(values[key][-1])}" for _, key, name in shown)
    summary = f"{title} over {end:,.0f} steps; at the end: {at_end}"
    return f"""<figure class="chart"><h3>{escape(title)}</h3><ul class="key">{"".join(legend)}</ul>
<div class="plot" data-points="{escape(json.dumps(points, separators=(",", ":")))}">
<svg role="img" aria-label="{escape(summary)}" viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none">
{_rules(y_ticks, top, mark)}{"".join(paths)}</svg>
<div aria-hidden="true">{_labels(y_ticks, top, end)}</div><div class="cursor" hidden></div></div></figure>"""


def _rules(y_ticks: Sequence[float], top: float, mark: float | None) -> str:
    rules = [f'<path class="rule" d="M0 {_y(v, top)}H{SIZE}"/>' for v in y_ticks]
    if mark is not None:
        rules.append(f'<path class="mark" d="M0 {_y(mark, top)}H{SIZE}"/>')
    return "".join(rules)


def _labels(y_ticks: Sequence[float], top: float, end: float) -> str:
    """The ticks' text, as HTML over the plot: the SVG is stretched, and would stretch it too."""
    y = (f'<span class="ticks y" style="bottom:{100 * v / top:.2f}%">{_tick(v, top)}</span>' for v in y_ticks)
    steps = [v for v in scale(end, 5)[1] if v <= end and v == int(v)]
    x = (f'<span class="ticks x" style="left:{100 * v / end:.2f}%">{_tick(v, max(end, 8))}</span>' for v in steps)
    return "".join((*y, *x))


def _y(value: float, top: float) -> str:
    """From the top of the plot down; far outliers end just outside of it, where the SVG clips them."""
    return f"{min(max(SIZE * (1 - value / top), -SIZE), 2 * SIZE):.1f}"


def _tick(value: float, top: float) -> str:
    if top >= 1e5:
        return f"{value / 1e6:.4g}M" if top >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:,.0f}" if top >= 8 else f"{value:.4g}"


def _path(x: Sequence[float], column: Sequence[Sequence[float]], top: float) -> str:
    """A path through the smallest and the largest value of each group, in their order; a group without any is a gap."""
    commands, pen_down = [], False
    for at, values in zip(x, column, strict=True):
        ends = sorted({values.index(min(values)), values.index(max(values))}) if values else []
        for i in ends:
            commands.append(f"{'L' if pen_down else 'M'}{at:.1f} {_y(values[i], top)}{'' if pen_down else 'h0'}")
            pen_down = True
        pen_down = bool(ends)
    return "".join(commands)


def _moving_median(column: Sequence[Sequence[float]]) -> list[list[float]]:
    """The median of each group's and its neighbours' values, over a thirtieth of the run in all. Gaps stay gaps."""
    reach = max(1, len(column) // 60)
    windows = (column[max(0, i - reach) : i + reach + 1] for i in range(len(column)))
    nearby = ([v for values in window for v in values] for window in windows)
    return [[median(near)] if values else [] for values, near in zip(column, nearby, strict=True)]
