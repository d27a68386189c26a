"""Dependent launch of the Triton kernels, interpreted: the first program of each launch finds none of what the launch
before it writes until it waits. That compiled code keeps that order is `test_resources.py`'s to show."""

import ast
from pathlib import Path

import pytest
import torch
from interpreter import only_interpreted
from test_triton_fused_step import ARCHES, batch, networks

from bench.sanitizer.cases import CASES, launchers, noise_on
from dcgan.fused import FusedStep
from dcgan.step import adam
from kernels import dependent
from kernels._triton import dependent as waiting
from kernels._triton.launch import Launch

only_interpreted()

POISON = 0xFF  # NaN in every type, −1 in the integers
CHEAP = ("batch_norm", "head", "adam", "gather")


def memory_of(launch):
    """The storages of a launch's tensors, as bytes."""
    bases = [getattr(value, "base", value) for value in launch.arguments.values()]  # of a TMA descriptor its tensor
    storages = [base.untyped_storage() for base in bases if isinstance(base, torch.Tensor)]
    once = {storage.data_ptr(): storage for storage in storages}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in once.values()]


class Early:
    """Takes the place of `Launch.run` and of the wait; `left` is what all memory of all launches held after each."""

    def __init__(self, monkeypatch):
        self.pending, self.left, self.kernels = None, [], set()
        monkeypatch.setattr(Launch, "run", lambda launch: self.run(launch))
        monkeypatch.setattr(waiting, "gdc_wait", self.wait)
        monkeypatch.setattr(waiting, "gdc_launch_dependents", lambda: None)

    def run(self, launch):
        memory, name = memory_of(launch), launch.kernel.fn.__name__
        self.kernels.add(name)
        if dependent.asked():
            self.pending = [(part, part.clone()) for part in memory]
            for part in memory:
                part.fill_(POISON)
        launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps, num_stages=launch.stages)
        assert self.pending is None, f"{name} does not wait"
        self.left += [part.clone() for part in memory if "table" not in launch.arguments]  # of addresses

    def wait(self):
        for part, written in self.pending or ():
            assert (part == POISON).all(), "something is written before the wait"
            part.copy_(written)
        self.pending = None


def in_both_ways(run, monkeypatch):
    """What `run` returns, and all that its launches leave, launched one after the other, and early; and the kernels."""
    found = []
    torch.use_deterministic_algorithms(True)  # and with it, the same in what torch.empty gives
    try:
        for ask in (False, True):
            early = Early(monkeypatch)
            with dependent.dependent_launches(ask):
                found.append([*run(), *early.left])
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return early.kernels


@pytest.mark.parametrize("case", CHEAP)
def test_nothing_is_read_or_written_before_the_launch_before_has_ended(case, monkeypatch):
    def run():
        made, noise = [], noise_on(torch.device("cpu"))

        def noted(*shape, dtype=torch.float16):  # the interpreter has no bfloat16
            made.append(noise(*shape, dtype=torch.float16 if dtype == torch.bfloat16 else dtype))
            return made[-1]

        CASES[case](launchers("triton"), noted)
        return made

    assert in_both_ways(run, monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_whose_launches_overlap_is_the_same_step(precision, monkeypatch):
    arch = ARCHES["16×16 RGB"]

    def run():
        models = networks(arch)
        step = FusedStep(*models, *map(adam, models), precision=precision, launch=launchers("triton"))
        metrics = step(*batch(arch, 2, torch.Generator().manual_seed(1)))
        return [metrics, *(t for model in models for t in model.state_dict().values())]

    kernels = in_both_ways(run, monkeypatch)
    assert {"conv_kernel", "conv_transpose_kernel", "conv_transpose_image_kernel", "wgrad_kernel"} <= kernels


def test_every_kernel_waits_first_in_each_of_its_programs():
    """In no branch: the other tests see the first program alone."""
    for path in Path(waiting.__file__).parent.glob("*.py"):
        for kernel in ast.parse(path.read_text()).body:
            if isinstance(kernel, ast.FunctionDef) and kernel.name.endswith("_kernel"):
                assert ast.unparse(kernel.body[1]) == "after_previous(DEPENDENT)", kernel.name  # behind its docstring


def test_a_kernel_that_does_not_wait_is_caught(monkeypatch):
    monkeypatch.setattr(Early, "wait", lambda self: None)
    with pytest.raises(AssertionError, match="does not wait"):
        in_both_ways(lambda: CASES["head"](launchers("triton"), noise_on(torch.device("cpu"))) or [], monkeypatch)
