"""The README's table comes from the records, and nothing that looks measured in it comes from elsewhere."""

import json
import sys

import pytest

from bench import record, report
from bench.pages import page
from bench.pages.records import newest, records, significant
from bench.report import BEGIN, END, faults, table, unrecorded
from dcgan.errors import run_command

README = f"# A title\n\n{BEGIN}\n{END}\n\nImages of 64×64, 128 filters, 9/16 of the multiplications.\n"
B64 = {
    "step_ms": 412.345, "images_per_s": 155.21, "roofline": 0.41, "over_example": 2.2342, "over_best_peer": 1.31,
    "best_peer": "example+bf16", "peak_memory_over_example": None, "noisy": False,
    "ours": "fused",
}  # fmt: skip

ROWS = [
    {"suite": "peers", "name": "example", "p50_ms": 921.04},
    {
        "suite": "ops",
        "name": "conv_bn_act/D2/forward/triton/bf16/b128",
        "tflops": 512.3,
        "gbps": 1834.0,
        "over_library": 1.07,
    },
]


def put(results, machine, day, gpu=None, **batches):
    folder = results / machine / f"2026-01-{day}_step"
    folder.mkdir(parents=True)
    environment = {"date": f"2026-01-{day}T00:00:00Z", "cpu": "Abacus", "threads": 2, "gpu": gpu}
    (folder / "env.json").write_text(json.dumps(environment | {"commit": "c0ffee" * 7, "dirty": False}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if batches:
        (folder / "summary.json").write_text(json.dumps({"cpu": "Abacus", "commit": "c0ffee", **batches}))
    return folder


@pytest.fixture
def results(tmp_path):
    put(tmp_path, "abacus", "01", b64=B64 | {"step_ms": 999.9})
    put(tmp_path, "abacus", "02", b64=B64, b16=B64 | {"noisy": True})
    put(tmp_path, "abacus", "03")  # of something else than the step
    put(
        tmp_path,
        "big-gpu",
        "01",
        gpu="Big GPU",
        preset="paper",
        b128=B64 | {"step_ms": 0.71234, "peak_memory_over_example": 0.48},
    )
    return tmp_path


def test_a_line_a_batch_of_each_machines_newest_record_of_the_step(results):
    lines = table(records(results), results).splitlines()
    assert [entry.folder.name for entry in newest(records(results))] == ["2026-01-02_step", "2026-01-01_step"]
    assert len([text for text in lines if text.startswith("|")]) == 2 + 3
    assert lines[2].startswith("| Abacus, 2 threads | 16 |")
    assert "| 2.23× (noisy) | 1.31× (example+bf16) (noisy) |" in lines[2] and "(noisy)" not in lines[3]
    assert "| 64 | 412 ms (fused) | 155 | 41% | 2.23× | 1.31× (example+bf16) | – |" in lines[3]
    assert (
        "| Big GPU | 128, paper | 0.712 ms (fused) |" in lines[4]
        and "| 48% | [2026-01-01](big-gpu/2026-01-01_step), c0ffeec0 |" in lines[4]
    )
    assert "999" not in "\n".join(lines)


def test_the_command_writes_the_table_once_and_check_agrees(results, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["report", "--readme", str(readme), "--results", str(results), *flags])
        return run_command(report.command), capsys.readouterr().err

    code, error = run("--check")
    assert code == 3 and "stale" in error and readme.read_text() == README
    assert run() == (0, "")
    written = readme.read_text()
    assert written.startswith(README.split(END)[0]) and written.endswith(END + README.split(END)[1])
    assert run("--check") == (0, "") and run() == (0, "") and readme.read_text() == written
    readme.write_text(written.replace("412 ms", "312 ms"))
    assert run("--check")[0] == 3, "an edited figure"
    readme.write_text(written)
    shown = (results / page.NAME).read_text()
    assert shown == page.render(records(results)) and "Big GPU" in shown
    (results / page.NAME).write_text(shown.replace("412", "312"))
    code, error = run("--check")
    assert code == 3 and "report.html is stale" in error and "table" not in error
    (results / page.NAME).unlink()
    assert run("--check")[0] == 3 and run()[0] == 0 and run("--check")[0] == 0
    readme.write_text(README.replace(END, ""))
    assert run()[0] == 2 and run("--check")[0] == 2
    readme.unlink()
    assert run()[0] == 2


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("takes 412 ms", []),
        ("takes 412.3 ms", []),
        ("takes 413 ms", ["413 ms"]),
        ("the example takes 921 ms", []),  # a row's, not the summary's
        ("2.2× the example", []),
        ("2.3× the example, 64×64 pixels, k4 s2", ["2.3×"]),
        ("712 µs at 155 images/s", []),
        ("1,084 ms; 3,680 images/s", ["1,084 ms", "3,680 images/s"]),
        ("```\n17 ms\n```", []),
        ("512 TFLOP/s, 1,834 GB/s, 1.8 TB/s, 1.07×", []),
        ("513 TFLOP/s, 1.9 TB/s, 1.08×", ["513 TFLOP/s", "1.9 TB/s", "1.08×"]),
        ("790 TFLOP/s, 64 images, 20 steps, 1e-10", ["790 TFLOP/s"]),
    ],
)
def test_a_figure_without_a_record_is_found(results, text, missing):
    assert unrecorded(text, records(results)) == missing


def test_numbers_keep_three_digits():
    assert [significant(value) for value in (0.71234, 5.041, 41.26, 412.3, 1234.5, 1234567.0)] == [
        "0.712", "5.04", "41.3", "412", "1,234", "1,234,567",
    ]  # fmt: skip


def test_no_records_no_table(tmp_path):
    assert table(records(tmp_path)) == "" and faults(README, "README.md", []) == []


@pytest.mark.parametrize(("noisy", "best", "marks"), [(True, False, 1), (False, True, 1), (True, None, 2)])
def test_each_ratio_has_its_own_mark(tmp_path, noisy, best, marks):
    put(tmp_path, "abacus", "01", b64=B64 | {"noisy": noisy, "best_peer_noisy": best})
    (text,) = [text for text in table(records(tmp_path), tmp_path).splitlines() if "| 64 |" in text]
    assert text.count("(noisy)") == marks
    assert ("(example+bf16) (noisy)" in text) == (best is not False)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("env.json", "{", "JSONDecodeError"),
        ("env.json", None, "env.json"),
        ("env.json", "[]", "must be an object"),
        ("env.json", '{"cpu": "x", "threads": 2}', "'date'"),
        ("env.json", '{"cpu": "x", "threads": 2, "date": 5}', "date is 5"),
        ("rows.jsonl", '{"suite": "peers"}\n{"suite": "st', "line 2 of rows.jsonl"),
        ("rows.jsonl", "17\n", "must be an object"),
        ("rows.jsonl", None, "rows.jsonl"),
        ("summary.json", "[1]", "must be an object"),
    ],
)
def test_a_broken_record_is_one_line_that_names_it(results, monkeypatch, capsys, name, content, named):
    path = results / "abacus/2026-01-02_step" / name
    path.unlink() if content is None else path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(results), "--check"])
    code, error = run_command(report.command), capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "2026-01-02_step: not a record" in error and named in error


def test_the_readme_says_what_the_records_say():
    readme = record.ROOT / "README.md"
    assert faults(readme.read_text(), readme.name, records(record.RESULTS)) == []
