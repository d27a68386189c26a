"""metrics.jsonl and what a person watches."""

import io
import json
import math
import os
import resource
import sys
import types
import warnings

import numpy as np
import pytest

from dcgan.errors import InputError
from dcgan.progress import FIELDS, MetricsLog, Progress, clock, describe, read

NAN = math.nan


def line(step, **changes):
    values = {
        "step": step, "epoch": step / 4, "loss_d": 0.8, "loss_g": 2.1, "d_real": 0.7, "d_fake_before": 0.24,
        "d_fake_after": 0.19, "images_per_s": 12345.6, "seconds": step * 0.5,
    }  # fmt: skip
    return values | changes


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append(line(step))
    return log


def steps(path):
    return [values["step"] for values in read(path)]


# metrics.jsonl


def test_a_line_is_there_at_once_and_reads_back(log):
    assert read(log.path) == [line(10), line(20), line(30)]
    assert log.path.read_bytes().count(b"\n") == 3


def test_keys_come_in_order_and_others_after_them(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"fid": 3.5, **dict(reversed(line(1).items()))})
    assert list(read(log.path)[0]) == [*FIELDS, "fid"]


def test_nan_and_infinity_are_null_and_the_line_is_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(line(np.int64(7), d_fake_after=NAN, loss_g=math.inf, loss_d=np.float32(0.5)))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    values = json.loads(log.path.read_text(), parse_constant=refuse)
    assert values == line(7, d_fake_after=None, loss_g=None, loss_d=0.5) and isinstance(values["step"], int)


@pytest.mark.parametrize(
    "torn", [b'{"step": 40, "loss_d"', b'{"step": 40, "epoch": "\xc3', b"null", b"{}", b"[" * 99_999]
)
def test_a_torn_last_line_is_passed_over_and_closed_by_the_next(log, torn):
    with open(log.path, "ab") as file:
        file.write(torn)
    assert steps(log.path) == [10, 20, 30]
    log.append(line(50))
    assert steps(log.path) == [10, 20, 30, 50]


def test_a_whole_line_without_its_newline_counts(log):
    os.truncate(log.path, log.path.stat().st_size - 1)
    assert steps(log.path) == [10, 20, 30]
    log.append(line(40))
    assert steps(log.path) == [10, 20, 30, 40]


def test_no_file_is_no_lines(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", [b"", b'{"step": 4'])
@pytest.mark.parametrize(
    ("step", "left"), [(0, []), (9, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30]), (99, [10, 20, 30])]
)
def test_truncation_removes_later_lines_and_torn_ones(log, torn, step, left):
    with open(log.path, "ab") as file:
        file.write(torn)
    log.truncate_after(step)
    assert steps(log.path) == left
    assert log.path.read_bytes().count(b"\n") == len(left) == len(log.path.read_bytes().splitlines())
    log.append(line(31))
    assert steps(log.path) == [*left, 31]


def test_truncation_in_the_middle_replaces_the_file_whole(log, monkeypatch):
    log.append(line(15))  # later than 20 and 30 in the file: the kept lines are not its beginning
    before = log.path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
        log.truncate_after(15)
    assert log.path.read_bytes() == before
    log.truncate_after(15)
    assert steps(log.path) == [10, 15] and list(log.path.parent.iterdir()) == [log.path]


# A disk that is full


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_warns_once_and_loses_no_line(log):
    path, log.path = log.path, log.path.parent / "full"
    log.path.symlink_to("/dev/full")
    with pytest.warns(RuntimeWarning, match=r"full could not be written .*No space left.*training goes on") as caught:
        log.append(line(40))
        log.append(line(50, loss_d=NAN))
    assert len(caught) == 1
    log.path = path
    log.append(line(60))
    assert steps(path) == [10, 20, 30, 40, 50, 60] and read(path)[4]["loss_d"] is None


def test_a_disk_that_fills_within_a_line_takes_none_of_it(log):
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
            log.append(line(40))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caught) == 1 and log.path.read_bytes() == before
    log.append(line(50))
    assert steps(log.path) == [10, 20, 30, 40, 50]


def test_a_rollback_forgets_the_lines_that_wait(log):
    path, log.path = log.path, log.path.parent / "absent" / "metrics.jsonl"
    with pytest.warns(RuntimeWarning, match="absent"):
        log.append(line(40))
        log.append(line(50))
    log.path = path
    log.truncate_after(40)
    log.append(line(45))
    assert steps(path) == [10, 20, 30, 40, 45]


def test_lines_that_wait_are_bounded(log, monkeypatch):
    monkeypatch.setattr("dcgan.progress.MAX_PENDING", 2)
    path, log.path = log.path, log.path.parent / "absent" / "metrics.jsonl"
    with pytest.warns(RuntimeWarning, match="absent"):
        for step in (40, 50, 60):
            log.append(line(step))
    log.path = path
    log.append(line(70))
    assert steps(path) == [10, 20, 30, 60, 70]


# TensorBoard


def test_a_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"--tensorboard: .*pip install tensorboard"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")


def test_tensorboard_gets_finite_values_and_is_purged_with_the_rest(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, key, value, step):
            if step == 9:
                raise OSError("full")
            calls.append((key, value, step))

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tb")
    log.append({"step": 3, "loss_d": 0.5, "d_fake_after": NAN, "seconds": 1.0})
    log.truncate_after(2)
    with pytest.warns(RuntimeWarning, match="TensorBoard"):
        log.append(line(9))
    log.append(line(10))
    log.close()
    folder = str(tmp_path / "tb")
    assert calls == [("open", folder, None), ("loss_d", 0.5, 3), "close", ("open", folder, 3)]
    assert steps(log.path) == [9, 10]


# What a person watches


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_of_metrics_in_words():
    assert describe(line(1)) == "D 0.800  G 2.100  D(x) 0.70  D(G(z)) 0.24 → 0.19  12,346 images/s"
    assert describe(line(1, d_fake_after=NAN, images_per_s=59.04)).endswith("D(G(z)) 0.24  59.0 images/s")
    assert describe({"step": 1}) == "D –  G –  D(x) –  D(G(z)) –  – images/s"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (425, "7:05"), (4025, "1:07:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_off_a_terminal_it_prints_a_line_for_each_line_and_none_for_a_step(monkeypatch):
    now = iter([100.0, 110.0])
    monkeypatch.setattr("dcgan.progress.time.perf_counter", lambda: next(now))
    stream = io.StringIO()
    with Progress(100, initial=20, per_epoch=4, stream=stream) as progress:
        for step in range(21, 41):
            progress.advance(step)
        progress.log(line(40))
        progress.message("a warning")
    assert stream.getvalue() == (
        f"step  40/100  epoch 10.00/25  {describe(line(40))}  0:10 gone, 0:30 left\na warning\n"
    )


def test_on_a_terminal_it_draws_a_bar_that_can_go_back():
    stream = Terminal()
    with Progress(100, initial=20, stream=stream) as progress:
        progress.advance(60)
        progress.log(line(60))
        progress.message("a warning")
        progress.advance(40)
        assert progress.bar.n == 40
        progress.advance(100)
    text = stream.getvalue()
    assert " 20/100 " in text and " 40/100 " in text and "\ra warning\n" in text
    assert text.rstrip("\n").split("\r")[-1].startswith("100%") and describe(line(60)) in text


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_lost_stream_does_not_end_the_run(kind):
    stream = kind()
    progress = Progress(3, stream=stream)
    stream.close()
    for step in (1, 2, 1, 3):
        progress.advance(step)
        progress.log(line(step))
        progress.message("unheard")
    progress.close()
