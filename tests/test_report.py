"""The page about a run: whole, self-contained, and harmless whatever the files say."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dcgan import report
from dcgan.curves import chart, scale
from dcgan.grid import save_png
from dcgan.report import write_report

HOSTILE = "<script>alert('x')</script>\"onload='y' & \ud800 </style>"
VOID = {"meta", "img", "path"}


class Page(HTMLParser):
    """What is in the page: checks that every element is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags, self.words = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def visible(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def line(step, **changes):
    values = {
        "step": step, "epoch": step / 50, "loss_d": 0.8, "loss_g": 2.125, "d_real": 0.7, "d_fake_before": 0.2,
        "d_fake_after": 0.1, "images_per_s": 1500.0 + step, "seconds": step * 0.25,
    }  # fmt: skip
    return values | changes


CONFIG = {
    "data": "/pictures/faces", "preset": "dcgan64", "batch_size": 64, "steps": 1000, "epochs": 25, "precision": "bf16",
    "device": "cuda", "fused": True, "lr": 2e-4,
    "resolved": {
        "device_name": "NVIDIA H200", "torch": "2.13.0", "images": 3190, "steps_per_epoch": 50,
        "backends": [{"layer": "G2", "backend": "eager", "why": "a layer without batch norm"}],
    },
}  # fmt: skip


def make(run, config=CONFIG, lines=(), snapshots=(), real=True):
    (run / "samples").mkdir()
    if config is not None:
        (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    for step in snapshots:
        save_png(run / f"samples/step_{step:08d}.png", np.full((4, 4, 3), step % 256, np.uint8))
    if real:
        save_png(run / "samples/real.png", np.zeros((4, 4), np.uint8))
    path = write_report(run)
    assert path == run / "report.html" and not list(run.glob("*.partial"))
    return Page(path.read_text(encoding="utf-8"))


def test_a_run_from_its_title_to_its_configuration(tmp_path):
    page = make(tmp_path, lines=[line(step) for step in range(10, 501, 10)], snapshots=[100, 300, 500])
    text = page.visible
    for words in (
        "dcgan64 on faces", "NVIDIA H200 · bf16 · fused", "Steps500 of 1,000", "Epochs10 of 25", "Images seen31,900",
        "Training time2 min 05 s", "Images/s, mean1,755 last 2,000", "Last losses, D / G0.800 / 2.125",
        "Generated, step 500", "Real, faces", "G2eagera layer without batch norm", "lr0.0002", "torch2.13.0",
    ):  # fmt: skip
        assert words in text, words
    assert len(page.all("figure")) == 2 + 3 and page.all("html")[0]["lang"] == "en"
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert labels[0] == "Losses over 500 steps; at the end: D 0.800, G 2.125" and len(labels) == 3


def test_nothing_is_loaded_from_outside(tmp_path):
    page = make(tmp_path, lines=[line(1), line(2)], snapshots=[1, 2])
    assert "://" not in page.text and "@import" not in page.text and "url(" not in page.text
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form", "a"}
    for tag, attributes in page.tags:
        if source := attributes.get("src"):
            assert tag == "img" and source.startswith("data:image/")
            assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (4, 4)
    assert all(image["alt"] for image in page.all("img"))


def test_the_policy_lets_the_one_script_run(tmp_path):
    page = make(tmp_path)
    script = re.search(r"<script>(.*?)</script>", page.text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.all("meta")[-1]["content"]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert page.text.count("<script") == 1


def attribute_names(page):
    return {name for _, attributes in page.tags for name in attributes}


def test_whatever_the_files_say_is_only_text(tmp_path):
    row = {"layer": HOSTILE, HOSTILE: HOSTILE, "why": [HOSTILE]}
    config = {name: HOSTILE for name in ("data", "preset", "precision", "device", HOSTILE)}
    config |= {"backends": [row], "resolved": {"dataset": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}}
    page = make(tmp_path, config, [line(1, loss_d=HOSTILE, epoch=HOSTILE, seconds={})], [1, 2])
    (tmp_path / "friendly").mkdir()
    friendly = make(tmp_path / "friendly", lines=[line(1)], snapshots=[1, 2])
    assert [tag for tag, _ in page.tags if tag in ("script", "style")] == ["style", "script"]
    assert attribute_names(page) == attribute_names(friendly)
    assert "<script>alert('x')" in page.visible and "<script>alert" not in page.text


@pytest.mark.parametrize("count", [2, 3, 12, 13, 50])
def test_snapshots_have_captions_and_the_last_is_large(tmp_path, count):
    steps = [7 * i for i in range(1, count + 1)]
    page = make(tmp_path, snapshots=reversed(steps))
    large, *strip = [int(step) for step in re.findall(r"step (\d+)", page.visible)]
    assert (large, strip[0], strip[-1]) == (steps[-1], steps[0], steps[-1])
    assert len(strip) == min(count, 12) and strip == sorted(set(strip)) and set(strip) <= set(steps)
    assert [button["aria-pressed"] for button in page.all("button")] == ["false"] * (len(strip) - 1) + ["true"]
    last, _, *images = page.all("img")
    assert [image["alt"].split()[-1] for image in images] == [str(step) for step in strip]
    assert last["id"] == "large" and last["src"] == images[-1]["src"] != images[-2]["src"]


def test_one_snapshot_needs_no_strip(tmp_path):
    page = make(tmp_path, snapshots=[5], real=False)
    assert len(page.all("img")) == 1 and not page.all("button") and "Generated, step 5" in page.visible


def test_an_empty_run_is_a_page(tmp_path):
    page = Page(write_report(tmp_path).read_text())
    assert "DCGAN on unknown data" in page.visible and "No metrics yet." in page.visible and not page.all("img")


@pytest.mark.parametrize("config", ["{", "[]", '{"resolved": 3, "backends": "none", "steps": "many"}'])
def test_a_strange_configuration_is_a_page(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    page = make(tmp_path, None, [line(5)])
    assert "Steps5" in page.visible and ("backendsnone" in page.visible) == ("none" in config)


def test_unreadable_pictures_are_left_out(tmp_path):
    make(tmp_path, snapshots=[1, 2, 3], real=False)
    samples = tmp_path / "samples"
    (samples / "step_00000002.png").write_bytes((samples / "step_00000002.png").read_bytes()[:40])
    (samples / "step_4.png").write_text("no picture")
    (samples / "step_x.png").mkdir()
    (samples / "real.png").write_bytes(b"")
    page = Page(write_report(tmp_path).read_text())
    assert re.findall(r"step (\d+)", page.visible) == ["3", "1", "3"]


def test_a_large_picture_is_embedded_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EMBED_BYTES", 1000)
    monkeypatch.setattr(report, "EMBED_PIXELS", 32)
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    save_png(tmp_path / "samples/real.png", noise)
    (image,) = Page(write_report(tmp_path).read_text()).all("img")
    assert image["src"].startswith("data:image/webp") and (image["width"], image["height"]) == ("32", "16")
    monkeypatch.setattr(report, "LARGEST", 64 * 128 - 1)
    assert not Page(write_report(tmp_path).read_text()).all("img")


# The curves


def paths(text, key="raw"):
    """The points of each curve: lists of (command, x, y)."""
    plot = text.partition("data-points")[2]  # what comes before it is the legend
    found = re.findall(rf'<path class="s\d ?{key}" d="([^"]*)"', plot)
    return [[(c, float(x), float(y)) for c, x, y in re.findall(r"([ML])([-\d.]+) ([-\d.]+)", d)] for d in found]


def test_a_short_curve_goes_through_its_points_and_breaks_at_null():
    lines = [{"step": 1, "v": 0.0}, {"step": 2, "v": 5}, {"step": 3, "v": None}, {"step": 4, "v": 10.0}]
    text = chart("T", (("v", "value"), ("absent", "never")), lines)
    assert paths(text, "") == [[("M", 250, 1000), ("L", 500, 500), ("M", 1000, 0)]]
    assert "never" not in text
    points = json.loads(next(attributes["data-points"] for attributes in Page(text).all("div")))
    assert points == {"x": [0.25, 0.5, 0.75, 1], "text": [["0.000", "5.000", "–", "10.000"], ["1", "2", "3", "4"]]}


@pytest.mark.parametrize("count", [300, 301, 600, 601, 7001])
def test_a_long_curve_has_at_most_600_points_and_keeps_its_spikes(count):
    lines = [{"step": i + 1, "v": 3.0 if i == 77 else 1.0 + i % 2 / 5} for i in range(count)]
    text = chart("T", (("v", "value"),), lines, top=4)
    (thin,), (thick,) = paths(text), paths(text, "")
    assert len(thin) <= 600 and len(thick) <= 300
    assert min(y for _, _, y in thin) == 250 and sum(y == 250 for _, _, y in thin) == 1
    assert min(y for _, _, y in thick) >= 700  # a median is not moved by it


def test_outliers_leave_the_plot_and_are_named():
    lines = [{"step": i, "v": 60.0 if i == 5 else 2.0} for i in range(1, 101)]
    assert "highest 60.000, above the plot" in chart("T", (("v", "value"),), lines)
    assert "above the plot" not in chart("T", (("v", "value"),), lines[5:])


def test_a_single_line_is_a_dot():
    assert paths(chart("T", (("v", "value"),), [{"step": 20, "v": 2.0}]), "dot") == [[("M", 1000, 0)]]


def test_no_values_no_chart():
    assert chart("T", (("v", "value"),), []) == chart("T", (("v", "value"),), [{"step": 1, "v": None}]) == ""


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3.2, [0, 1, 2, 3, 4]),
        (0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1e-320, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (990, list(range(0, 1001, 200))),
    ],
)
def test_axes_end_above_the_values_on_round_ticks(largest, ticks):
    assert scale(largest, 5) == (pytest.approx(ticks[-1]), pytest.approx(ticks))


@pytest.mark.parametrize("value", [1e308, 1e-320, -5.0, True, 10**400])
def test_absurd_values_still_make_a_page(tmp_path, value):
    make(tmp_path, lines=[line(1, loss_d=value), line(2, loss_g=value, images_per_s=value, seconds=value)])
