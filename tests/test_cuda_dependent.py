"""Dependent launch of the extension's kernels, on a CPU: none reads or writes anything before the launch before it has
ended, as far as `csrc/host.h` can show."""

import re

import pytest
import torch
from cuda_host import CSRC, call, on_host

from bench.sanitizer.cases import CASES, TRITON_ALONE, launchers, noise_on
from kernels import dependent
from kernels._cuda import conv
from kernels._cuda import launch as launch_module

KERNELS = re.compile(r"^__global__", re.M)


def left_by(case, source, monkeypatch):
    """What every tensor of a case holds in the end: after plain launches, and after dependent ones; `source` is that of
    the products between maps, `sm90` or `sm80`."""
    monkeypatch.setattr(conv, "source", lambda tensor: source)

    def run():
        made, left = [], []
        noise = noise_on(torch.device("cpu"))

        def recorded(op, *arguments):
            call(op, *arguments, pending=made if op == "adam" else ())
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            left.extend(t.clone() for t in tensors if op != "adam" or t.ndim < 2)  # not where it found its tensors

        def noted(*shape, **options):
            made.append(noise(*shape, **options))
            return made[-1]

        with on_host():
            launch_module.launch = recorded
            CASES[case](launchers("cuda"), noted)
        return [*left, *made]

    plain = run()
    with dependent.dependent_launches():
        return plain, run()


def assert_same(plain, early):
    for one, other in zip(plain, early, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


CASES_AND_SOURCES = [(case, "sm90") for case in CASES if case not in TRITON_ALONE] + [("gemms", "sm80")]


@pytest.mark.parametrize("case, source", CASES_AND_SOURCES)
def test_nothing_is_read_or_written_before_the_launch_before_has_ended(case, source, monkeypatch):
    assert_same(*left_by(case, source, monkeypatch))


def test_every_kernel_waits_and_lets_the_next_one_begin():
    for path in CSRC.glob("*.cu"):
        text = path.read_text()
        bodies = KERNELS.split(text)[1:]
        assert all(body.count("\n  after_previous();\n") == 1 for body in bodies), f"{path.name}: once, in no branch"
