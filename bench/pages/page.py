"""The page of all records: one self-contained HTML file without scripts, each machine's newest measurements first.

Everything on it comes from `bench/results`; what a machine's records do not hold, the page says is not measured. Each
section takes the newest record that has rows for it, and names it.
"""

from html import escape

from bench.pages import charts, plots, sections
from bench.pages.records import Record
from dcgan.page import STYLE

NAME = "report.html"
MISSING = '<p class="soft">Not measured: no record of this machine has rows for it.</p>'


def render(found: list[Record]) -> str:
    """The page, from records as `bench.pages.records.records` gives them."""
    machines: dict[str, list[Record]] = {}
    for entry in sorted(found, key=lambda entry: entry.environment["date"], reverse=True):
        machines.setdefault(entry.folder.parent.name, []).append(entry)
    gpus = any(entry.environment.get("gpu") for entry in found)
    count = f"{len(found)} record{'s' * (len(found) != 1)} of {len(machines)} machine{'s' * (len(machines) != 1)}"
    note = "" if gpus else " None of them is a GPU: this has not yet been measured on one."
    body = "\n".join(machine(entries) for entries in machines.values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>DCGAN benchmarks</title><style>{STYLE}{plots.STYLE}{OWN}</style></head><body>
<header><h1>DCGAN benchmarks</h1><p class="soft">{count}.{note} Steps and kernels were verified before they were timed;
docs/benchmarks.md says how.</p></header>
{body or '<p class="soft">No records yet.</p>'}
<footer>Written by <code>python -m bench.report</code> from the records beside this page.</footer></body></html>
"""


OWN = """
h2 { margin-top: 56px; padding-top: 20px; border-top: 2px solid var(--line); font-size: 22px }
h3 { margin-top: 32px; margin-bottom: 6px; font-size: 16px }
.chart h3 { margin: 0 }
td { vertical-align: middle; overflow-wrap: normal; white-space: nowrap }
th, td { padding-right: 18px }
td:has(.bar) { min-width: 96px; width: 22% }
caption { text-align: left; color: var(--soft); font-size: 13px; padding-bottom: 4px }
details { margin: 8px 0; font-size: 13px } summary { cursor: pointer; color: var(--soft) }
a { color: var(--c0) }
details td { white-space: normal }
td:last-child:not(:nth-child(-n+4)) { white-space: normal; min-width: 150px }
@media (min-width: 761px) { td:first-child wbr { display: none } }
@media (max-width: 760px) { td:first-child { white-space: normal; min-width: 116px } }
"""


def machine(entries: list[Record]) -> str:
    """All of a machine, from its records, newest first."""
    of_steps = next((entry for entry in entries if entry.batches()), entries[0])
    parts = [
        ("One training step", sections.headline(entries)),
        ("The ladder: what each addition to PyTorch's example gains", sections.ladder(entries)),
        ("What each part of the fused step is worth", sections.ablation(entries)),
        ("Single kernels under the roofline", charts.roofline(entries)),
        ("Scaling", charts.scaling(entries)),
        ("Peak memory of a step", sections.quantity(entries, "peak_memory_bytes", 2**-20, "MiB")),
        ("Energy", sections.quantity(entries, "joules_per_image", 1e3, "mJ an image")),
        ("Where the fused step's time goes", charts.profile(entries)),
        ("Samples: fused bf16 beside eager fp32", sections.samples(entries)),
        ("Records", sections.history(entries)),
    ]
    body = "\n".join(f"<h3>{title}</h3>\n{text or MISSING}" for title, text in parts)
    return f"<section><h2>{escape(of_steps.machine)}</h2>\n{body}\n</section>"
