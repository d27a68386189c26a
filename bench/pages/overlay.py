"""The training curves of runs of two kinds laid over each other, each kind the mean over its seeds: one HTML page."""

from collections import defaultdict
from html import escape
from statistics import mean

from dcgan.curves import chart, decimals, number
from dcgan.page import STYLE

CURVES = {
    "loss_d": "D's loss",
    "loss_g": "G's loss",
    "d_real": "D(x), real pictures",
    "d_fake_before": "D(G(z)), generated ones",
}


def overlaid(metrics: dict[str, list[list[dict]]], name: str) -> list[dict]:
    """A line a step with each kind's mean of `name` over the runs that have it there.

    Args:
        metrics: kind → runs → lines of metrics.jsonl.
        name: a key of these lines.
    """
    values: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for kind, runs in metrics.items():
        for line in (line for run in runs for line in run):
            if (value := number(line.get(name))) is not None:
                values[line["step"]][kind].append(value)
    return [{"step": step} | {kind: mean(found) for kind, found in values[step].items()} for step in sorted(values)]


def render(title: str, metrics: dict[str, list[list[dict]]]) -> str:
    """The page. `metrics` as above, at most three kinds."""
    series = [(kind, f"{kind}, {len(runs)} runs") for kind, runs in metrics.items()]
    charts = "".join(
        chart(text, series, overlaid(metrics, name), decimals, 1.0 if name.startswith("d_") else None)
        for name, text in CURVES.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}
.charts {{ margin-top: 24px }}
.charts > :nth-child(3) {{ grid-column: auto }} .charts > :nth-child(3) .plot {{ height: 216px }}</style></head><body>
<h1>{escape(title)}</h1><p class="soft">Mean over the seeds at each logged step; the figures are the last ones.</p>
<div class="charts">{charts or '<p class="soft">No metrics yet.</p>'}</div></body></html>
"""
