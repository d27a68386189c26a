"""Plots of the benchmark page as inline SVG: dots and lines over logarithmic axes, and the bars of a table's rows.

As in `dcgan.curves`, whose style sheet they share: an SVG stretches with the page, while dots, lines and the HTML text
over it keep their size, so that a phone shows them too. A dot says what it is when it is pointed at.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from dcgan.curves import SIZE

MOST_TICKS = 7
LOOKS = 4
"""Series that `STYLE` tells apart."""

STYLE = """
:root { --c3: #7d5fb2 }
@media (prefers-color-scheme: dark) { :root { --c3: #b79df0 } }
.s3 { stroke: var(--c3) }
.plot .dot { stroke-dasharray: none }
.plot .line { stroke-width: 1.5 }
.plot .roof { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 4 3 }
.plot.tall { height: 320px }
.key .roof { stroke: var(--soft); stroke-dasharray: 4 3 }
.bar { display: block; width: 100%; height: 12px }
.bar rect { stroke: none }
.bar .back { fill: var(--line) }
.b0 { fill: var(--c0) } .b1 { fill: var(--c1) } .b2 { fill: var(--c2) } .b3 { fill: var(--c3) }
"""


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Args:
        name: in the legend.
        points: x and y, both positive, and what the point says.
        look: 0 to 3, its colour.
        joined: a line through the points, by x.
    """

    name: str
    points: list[tuple[float, float, str]] = field(default_factory=list)
    look: int = 0
    joined: bool = False


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: where it begins and ends, and its ticks."""

    low: float
    high: float
    ticks: list[float]

    @classmethod
    def around(cls, values: Sequence[float], ticks: Sequence[float] | None = None) -> "Axis":
        """From the tick at or below the smallest value to the one at or above the largest.

        Args:
            values: positive, at least one.
            ticks: where to mark the axis; 1, 2 and 5 times powers of ten where None, or these alone if those are many.
        """
        low, high = min(values), max(values)
        if ticks is not None:
            pad = (high / low) ** 0.04 if high > low else 2.0
            return cls(low / pad, high * pad, list(ticks))
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        for steps in ((1, 2, 5), (1,)):
            every = [step * 10.0**power for power in powers for step in steps]
            first = max((i for i, tick in enumerate(every) if tick <= low * (1 + 1e-9)), default=0)
            last = next(i for i, tick in enumerate(every) if tick >= high * (1 - 1e-9) and i > first)
            found = every[first : last + 1]
            if len(found) <= MOST_TICKS:
                break
        return cls(found[0], found[-1], found)

    def place(self, value: float) -> float:
        """0 at the beginning, 1 at the end."""
        return math.log(value / self.low) / math.log(self.high / self.low)


def tick_text(value: float) -> str:
    """`0.05`, `200`, `5k`, `2M`."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def plot(
    title: str,
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    x_ticks: Sequence[float] | None = None,
    roofs: Callable[[float], float] | None = None,
    roof_name: str = "",
) -> str:
    """A figure with logarithmic axes, as HTML; empty where there is no point.

    Args:
        title: above it.
        series: of different looks; those without points are left out.
        x_name, y_name: what the axes are, with units.
        x_ticks: where to mark the x axis; round numbers where None.
        roofs: the most that y can be at x, drawn as a dotted line; roof_name: its entry in the legend.
    """
    shown = [some for some in series if some.points]
    if not shown:
        return ""
    x_axis = Axis.around([x for some in shown for x, _, _ in some.points], x_ticks)
    roof = [] if roofs is None else [(x, roofs(x)) for x in _between(x_axis)]
    y_axis = Axis.around([y for some in shown for _, y, _ in some.points] + ([max(y for _, y in roof)] if roof else []))

    def at(x: float, y: float) -> str:
        return f"{SIZE * x_axis.place(x):.1f} {min(SIZE * (1 - y_axis.place(y)), 2 * SIZE):.1f}"

    paths = [f'<path class="rule" d="M0 {SIZE * (1 - y_axis.place(tick)):.1f}H{SIZE}"/>' for tick in y_axis.ticks]
    legend = []
    if roof:
        paths.append(f'<path class="roof" d="M{"L".join(at(*point) for point in roof)}"/>')
        legend.append(_entry("roof", roof_name))
    for some in shown:
        points = sorted(some.points)
        if some.joined and len(points) > 1:
            paths.append(f'<path class="s{some.look} line" d="M{"L".join(at(x, y) for x, y, _ in points)}"/>')
        paths += [
            f'<path class="s{some.look} dot" d="M{at(x, y)}h0"><title>{escape(text)}</title></path>'
            for x, y, text in points
        ]
        legend.append(_entry(f"s{some.look}", some.name))
    summary = f"{title}: {y_name} over {x_name}; {', '.join(some.name for some in shown)}"
    return f"""<figure class="chart"><h3>{escape(title)}</h3>
<p class="soft">{escape(y_name)} over {escape(x_name)}</p><ul class="key">{"".join(legend)}</ul>
<div class="plot tall"><svg role="img" viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none">
<title>{escape(summary)}</title>{"".join(paths)}</svg>
<div aria-hidden="true">{_labels(x_axis, "x", "left")}{_labels(y_axis, "y", "bottom")}</div></div></figure>"""


def _between(axis: Axis, count: int = 40) -> list[float]:
    """Values from the axis's beginning to its end, equally spaced on it."""
    return [axis.low * (axis.high / axis.low) ** (i / count) for i in range(count + 1)]


def _entry(look: str, name: str) -> str:
    return f'<li><svg viewBox="0 0 18 8" aria-hidden="true"><path class="{look}" d="M1 4H17"/></svg>{escape(name)}</li>'


def _labels(axis: Axis, name: str, side: str) -> str:
    return "".join(
        f'<span class="ticks {name}" style="{side}:{100 * axis.place(tick):.2f}%">{tick_text(tick)}</span>'
        for tick in axis.ticks
    )


def bar(value: float, largest: float, text: str, look: int = 0, back: float = 0.0) -> str:
    """A bar as an SVG that fills its cell.

    Args:
        value, largest: its length, and that of the longest.
        text: what it says to those who cannot see it, or point at it.
        look: 0 to 3.
        back: a paler bar behind it, such as the time that a shorter floor is part of.
    """
    wide, behind = (100 * part / largest if largest > 0 else 0.0 for part in (value, back))
    shadow = f'<rect class="back" width="{behind:.2f}" height="10"/>' if back else ""
    return (
        f'<svg class="bar" role="img" viewBox="0 0 100 10" preserveAspectRatio="none"><title>{escape(text)}</title>'
        f'{shadow}<rect class="b{look}" width="{wide:.2f}" height="10"/></svg>'
    )


def breakable(name: str) -> str:
    """A row's name as HTML that may break after each of its parts."""
    return re.sub(r"([+/])", r"\1<wbr>", escape(name))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page; cells are HTML."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
