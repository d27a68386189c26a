"""The page of all records: what it shows, what it says is missing, and that it stands alone."""

import json
import re
from html.parser import HTMLParser

import pytest

from bench import record
from bench.pages import page, plots
from bench.pages.charts import dimensions, widest
from bench.pages.plots import Axis, Series, plot
from bench.pages.records import records
from bench.pages.sections import before

VOID = {"meta", "path", "rect", "wbr", "link", "br", "img"}


class Tree(HTMLParser):
    """Checks that every tag is closed, and gathers tags and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:  # a path may have a title inside
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


def step(name, batch, ms, suite="peers", **more):
    ours = name.split("+")[0] if name.startswith(("fused", "reference")) else ""
    figures = {"p20_ms": ms * 0.99, "p50_ms": ms, "p80_ms": ms * 1.02, "roofline": 0.5, "group": "eager", "ours": ours}
    return {"suite": suite, "name": name, "ok": True, "batch": batch} | figures | more


def op(name, tflops, gbps, ms, **more):
    recipe, precision = name.split("/")[3:5]
    figures = {"recipe": recipe, "precision": precision, "tflops": tflops, "gbps": gbps, "p50_ms": ms}
    ours = recipe if recipe in ("triton", "cuda") else ""
    return {
        "suite": "ops",
        "name": name,
        "ok": True,
        "ours": ours,
        **figures,
        "floor_ms": ms / 2,
        "roofline": 0.5,
    } | more


ROWS = [
    {"suite": "ceilings", "name": "matrix product bf16", "ok": True, "matrix_tflops": 700.0},
    {"suite": "ceilings", "name": "copy", "ok": True, "copy_tbps": 4.0},
    step("example", 128, 6.0, peak_memory_bytes=2**30, joules_per_image=0.02),
    step("example+bf16", 128, 4.0, over_example=1.5),
    step("example+bf16+graph", 128, 2.0, over_example=3.0, noisy=True),
    step("example+bf16+compile", 128, 1.9, group="compiled"),
    step("fused+bf16", 128, 1.0, over_example=6.0, peak_memory_bytes=2**29, joules_per_image=0.004),
    {"suite": "peers", "name": "jax+bf16", "ok": None, "why": "JAX is <not> installed", "batch": 128},
    step("fused+bf16", 64, 0.6, "step"),
    step("example", 64, 3.5, "step"),
    step("fused+bf16", 128, 4.0, "step", image_size=128, group="scaling", peak_memory_bytes=2**33),
    step("fused+bf16-merge", 128, 0.5, "step", off="merge", group="ablation", gain=1.11, gain_p20=1.1, gain_p80=1.12,
         noisy=True, peak_memory_bytes=2**34),
    step("fused+bf16-sums", 128, 1.3, "step", off="sums", group="ablation", gain=1.3, gain_p20=1.2, gain_p80=1.4),
    {"suite": "step", "name": "fused+bf16-batched", "ok": False, "off": "batched", "batch": 128,
     "why": "wrong <by> far"},
    step("sampling/fused+bf16/b128", 128, 0.1, "step", group="sampling", peak_memory_bytes=2**35),
    {"suite": "step", "name": "fused+bf16", "ok": False, "why": "wrong", "batch": 32, "p50_ms": 0.001},
    op("conv/D3/forward/triton/bf16/b256", 400.0, 2000.0, 0.05, over_library=1.25),
    op("conv/D2/forward/cuda/bf16/b256", 300.0, 2000.0, 0.5),
    op("conv/D3/forward/library/bf16/b256", 350.0, 1800.0, 0.06),
    op("adam/D/forward/triton/fp32/b256", None, 3000.0, 0.06),
    {"suite": "profile", "name": "D2 fwd", "ok": True, "ms": 0.3, "floor_ms": 0.2, "rung": "fused+bf16", "batch": 128},
    {"suite": "profile", "name": "Adam D", "ok": True, "ms": 0.9, "floor_ms": 0.2, "rung": "fused+bf16", "batch": 128},
    {"suite": "quality", "name": "frechet/step300", "ok": True, "step": 300, "seeds": 3, "measure": "frechet",
     "fused": 12.34, "eager": 12.5, "spread": 0.5, "difference_spreads": -0.32, "verdict": "inside"},
]  # fmt: skip
B128 = {"step_ms": 1.0, "images_per_s": 128e3, "roofline": 0.5, "over_example": 6.0, "over_best_peer": 1.9,
        "best_peer": "example+bf16+compile", "peak_memory_over_example": 0.5, "ours": "fused+bf16"}  # fmt: skip


def put(results, machine, day, rows, gpu=None, **summary):
    folder = results / machine / f"2026-01-{day}_x"
    folder.mkdir(parents=True)
    environment = {"date": f"2026-01-{day}T00:00:00Z", "cpu": f"CPU of {machine}", "threads": 2, "gpu": gpu}
    environment |= {"commit": "c0ffee" * 7, "dirty": False, "torch": "2.11.0", "triton": "3.6.0"}
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def results(tmp_path):
    put(tmp_path, "abacus", "01", [step("example", 16, 900.0), step("fused", 16, 450.0)])
    put(tmp_path, "big-gpu", "02", ROWS, gpu="Big <GPU>", b128=B128)
    put(tmp_path, "big-gpu", "03", [step("example", 128, 5.0, "step")], gpu="Big <GPU>")
    return tmp_path


def text_of(section, html):
    """The words under one heading of the first machine."""
    part = html.split(f"<h3>{section}")[1].split("\n<h3>")[0]
    return " ".join(" ".join(Tree(part.split("</h3>", 1)[1].split("</section>")[0]).words).split())


def test_it_stands_alone_and_is_well_formed(results):
    html = page.render(records(results))
    tags = Tree(html).tags
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert "http://" not in html and "https://" not in html and "url(" not in html
    assert all(not name.startswith("on") for _, attributes in tags for name in attributes)
    assert "default-src 'none'" in html and 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    assert html == page.render(records(results)), "a function of the records"


def test_every_svg_has_a_title_or_is_decoration(results):
    html = page.render(records(results))
    pictures = re.findall(r"<svg[^>]*>(?:\s*<title>[^<]+</title>)?", html)
    assert len(pictures) > 20
    assert all("aria-hidden" in svg or ("<title>" in svg and 'role="img"' in svg) for svg in pictures)


def test_machines_with_the_newest_record_first_and_what_the_files_say_escaped(results):
    html = page.render(records(results))
    assert html.index("Big &lt;GPU&gt;") < html.index("CPU of abacus") and "<GPU>" not in html
    assert "JAX is &lt;not&gt; installed" in html
    assert 'href="big-gpu/2026-01-02_x/README.md"' in html
    assert "3 records of 2 machines." in html and "not yet been measured" not in html


def test_sections_take_the_newest_record_that_has_rows(results):
    html = page.render(records(results))
    step_section = text_of("One training step", html)
    assert "2026-01-02_x" in step_section and "6.00×" in step_section and "1.90×" in step_section
    assert "50%" in step_section
    assert "2026-01-03_x" in text_of("Records", html)


def test_the_ladder_says_what_each_rung_gains(results):
    found = text_of("The ladder", page.render(records(results)))
    assert "example+ bf16 32,000 images/s" not in found and "example+bf16: 32,000 images/s" in found
    assert "1.50× over example" in found and "2.00× over example+ bf16" in found and "3.00× (noisy)" in found
    assert "1 without a time" in found and "wrong" not in found


def test_a_gain_is_over_the_rung_below_in_the_same_group():
    rows = [row for row in ROWS if row.get("suite") == "peers" and row["ok"]]
    named = {row["name"]: row for row in rows}
    assert before(named["example+bf16+graph"], rows)["name"] == "example+bf16"
    assert before(named["example"], rows) is None and before(named["fused+bf16"], rows) is None
    assert before(named["example+bf16+compile"], rows) is None, "its group has no other"


def test_kernels_under_the_roofline(results):
    html = page.render(records(results))
    found = text_of("Single kernels", html)
    assert "conv/D3/forward/triton/bf16/b256: 400 TFLOP/s, 2,000 GB/s, 50% of its floor" in found
    assert "700 TFLOP/s, 4.00 TB/s" in found and "adam/D/forward/triton/fp32/b256:" not in found
    left = found.split("Ours, farthest from the floor first")[1]
    assert left.index("D2") < left.index("adam") < left.index("D3") and "1.25×" in left
    assert "350" not in left, "the library's row is not ours"
    assert len(re.findall(r'h0"><title>conv', html)) == 3


def test_scaling_holds_the_other_axes(results):
    entry = next(entry for entry in records(results) if len(entry.rows) > 5)
    held, rows = widest(entry, "batch")
    assert dict(held) == {"image size": 64, "width": 64}
    assert {(kind, x): row["p50_ms"] for (kind, x), row in rows.items()} == {
        ("the example", 128): 6.0, ("the example", 64): 3.5, ("fused", 128): 1.0, ("fused", 64): 0.6,
        ("the best peer", 128): 1.9,
    }  # fmt: skip
    held, rows = widest(entry, "image size")
    assert dict(held) == {"batch": 128, "width": 64} and {x for _, x in rows} == {64, 128}
    assert dimensions({"batch": 4, "preset": "paper"}, entry) == {"batch": 4, "image size": 64, "width": 128}
    found = text_of("Scaling", page.render(records(results)))
    assert "By batch, at image size 64, width 64" in found and "Not measured: scaling with width." in found


def test_what_each_part_is_worth_stands_apart_from_the_whole_step(results):
    html = page.render(records(results))
    found = text_of("What each part", html)
    assert "sums 1.30 1.30× 1.20× to 1.40× merge 0.500 1.11× (noisy)" in found
    assert "Without batched, batch 128: wrong <by> far" in found
    memory = text_of("Peak memory", html)
    assert "MiB" in memory and "8,192" not in memory and "merge" not in memory and "sampling" not in memory


def test_the_headline_marks_each_ratio_that_is_noisy_and_has_the_sampling_rate(tmp_path):
    for machine, noisy in (("a", True), ("b", False)):
        summary = B128 | {"noisy": False, "best_peer_noisy": noisy}
        put(tmp_path, machine, "01", [], b128=summary, sampling_images_per_s=1234567.0)
    found = [
        text_of("One training step", "<h3>One" + part) for part in page.render(records(tmp_path)).split("<h3>One")[1:]
    ]
    assert sum("1.90× (example+bf16+compile) (noisy)" in text for text in found) == 1
    assert all("6.00× 1.90×" in text and "Sampling alone: 1,234,567 images/s." in text for text in found)


def test_memory_energy_profile_and_samples(results):
    html = page.render(records(results))
    assert "fused+bf16: 512 MiB" in text_of("Peak memory", html)
    assert "fused+bf16: 4.00 mJ an image" in text_of("Energy", html)
    where = text_of("Where the fused", html)
    assert where.index("Adam D") < where.index("D2 fwd") and "0.700" in where
    assert "Fréchet, features 12.5 12.3 0.500 -0.32 inside" in text_of("Samples", html)


def test_what_was_not_measured_is_said(tmp_path):
    put(tmp_path, "abacus", "01", [{"suite": "parity", "name": "x", "ok": True}])
    html = page.render(records(tmp_path))
    assert html.count(page.MISSING) == 9
    assert "1 record of 1 machine. None of them is a GPU: this has not yet been measured on one." in html
    assert "No records yet." in page.render([])


@pytest.mark.parametrize("spoil", [{"batch": None}, {"p50_ms": None}, {"p50_ms": "fast"}, {"p50_ms": 0}, {"ok": None}])
def test_a_row_without_figures_is_passed_over(tmp_path, spoil):
    put(tmp_path, "abacus", "01", [step("example", 64, 9.0) | spoil, {"suite": "ops", "ok": True, "name": "odd"}])
    html = page.render(records(tmp_path))
    assert text_of("The ladder", html) == "Not measured: no record of this machine has rows for it."


@pytest.mark.parametrize(
    ("values", "low", "high", "ticks"),
    [
        ([3.0, 40.0], 2, 50, [2, 5, 10, 20, 50]),
        ([0.5, 0.5], 0.5, 1, [0.5, 1]),
        ([1.0, 1e6], 1, 1e6, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        ([20.0, 100.0], 20, 100, [20, 50, 100]),
    ],
)
def test_an_axis_ends_at_round_numbers(values, low, high, ticks):
    axis = Axis.around(values)
    assert (axis.low, axis.high) == pytest.approx((low, high)) and axis.ticks == pytest.approx(ticks)
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == pytest.approx(1)


def test_a_plot_puts_points_where_they_belong():
    html = plot("T", [Series("a", [(100.0, 1.0, "one"), (1.0, 100.0, "two")], joined=True)], "x", "y")
    assert '<path class="s0 line" d="M0.0 0.0L1000.0 1000.0"/>' in html and 'd="M0.0 0.0h0"><title>two' in html
    assert plot("T", [Series("a")], "x", "y") == "" and "<title>T: y over x; a</title>" in html
    one = plot("T", [Series("a", [(8.0, 5.0, "")])], "x", "y", x_ticks=[8.0])
    assert 'd="M500.0 ' in one and "left:50.00%" in one
    roof = plot(
        "T", [Series("a", [(1.0, 1.0, ""), (100.0, 5.0, "")])], "x", "y", roofs=lambda x: min(x, 10.0), roof_name="10"
    )
    assert 'class="roof" d="M0.0 1000.0L' in roof and roof.count("<li>") == 2


def test_ticks_and_bars():
    found = [plots.tick_text(value) for value in (0.05, 200, 5000, 20_000, 2e6, 3e9)]
    assert found == ["0.05", "200", "5000", "20k", "2M", "3G"]
    assert 'class="b1" width="25.00"' in plots.bar(1, 4, "<", 1) and "&lt;" in plots.bar(1, 4, "<", 1)
    assert 'class="back" width="50.00"' in plots.bar(1, 4, "", back=2) and 'width="0.00"' in plots.bar(0, 0, "")


def test_the_page_says_what_the_records_say():
    target = record.RESULTS / page.NAME
    assert target.read_text() == page.render(records(record.RESULTS)), "run python -m bench.report"
    assert target.stat().st_size <= 1 << 20
