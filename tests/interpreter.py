"""Running Triton's kernels on a CPU, in its interpreter, so that a stray access shows.

Triton decides between compiling and interpreting as it is imported, so interpreted tests have a process of their own:
`test_triton_interpreter.py` starts one for each file, with TRITON_INTERPRET=1. bfloat16 is left to GPUs: the
interpreter's bf16 `tl.dot` is silently wrong. Each program instance takes about a millisecond, so shapes are small.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings

from dcgan.arch import PRESETS, SIZES, Arch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GUARD = 256  # elements on either side of a tensor
CANARY = 777.0


def only_interpreted():
    """Leave the module unless kernels are interpreted."""
    if not INTERPRETED:
        pytest.skip("runs in the interpreter's process: test_triton_interpreter.py", allow_module_level=True)


def _surrounded(shape, dtype, around, inside):
    size = 1
    for n in shape:
        size *= n
    buffer = torch.full((GUARD + size + GUARD,), around, dtype=dtype)
    view = buffer[GUARD : GUARD + size].view(shape)
    view.fill_(inside)
    return buffer, view


def fenced(tensor):
    """The same tensor amid NaN (or the dtype's greatest integer): what is read past its ends spoils the result."""
    floating = tensor.dtype.is_floating_point
    _, view = _surrounded(tensor.shape, tensor.dtype, float("nan") if floating else torch.iinfo(tensor.dtype).max, 0)
    return view.copy_(tensor)


def run_guarded(job, *kept):
    """Run a job with every tensor but `kept` filled with NaN and surrounded by canaries; fail where one died.

    Args:
        job: of a `prepare_…`.
        kept: the inputs, and what is updated in place.

    Returns:
        The job's result.
    """
    values = [value for launch in job.launches for name, value in launch.arguments.items() if name.startswith("ticket")]
    tickets = [value for value in values if value is not None]
    inputs = {id(t) for t in (*kept, *tickets)}
    guarded = {}

    def swap(value):
        if isinstance(value, tuple):
            parts = [swap(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if not isinstance(value, torch.Tensor) or id(value) in inputs:
            return value
        if id(value) not in guarded:
            floating = value.dtype.is_floating_point
            guarded[id(value)] = _surrounded(
                value.shape, value.dtype, CANARY if floating else 77, float("nan") if floating else 99
            )
        return guarded[id(value)][1]

    for launch in job.launches:
        replace(launch, arguments={name: swap(value) for name, value in launch.arguments.items()}).run()
    assert not any(ticket.any() for ticket in tickets), "a ticket was not put back"
    result = swap(job.result)
    for buffer, view in guarded.values():
        for edge in (buffer[:GUARD], buffer[-GUARD:]):
            assert (edge == buffer.new_tensor(CANARY if view.dtype.is_floating_point else 77)).all(), "a stray write"
    return result


def assert_accurate(ours, twin, oracle, name="", terms=1, addends=()):
    """The project's error bar: |ours − oracle| ≤ 2·|twin − oracle| + 2 ulp, ulp of the oracle's largest element.

    Args:
        ours: what the kernel made.
        twin: the reference in the same precision.
        oracle: the reference in float64.
        terms: of each sum. One fp32 accumulator, added to in order as the interpreter's does, rounds n times at up to
            half an ulp of a partial sum: of equal terms that strays by σ = ulp·√n / 6, and the bar is at six of them;
            a library sums in blocks.
        addends: what the results are sums of, or how far a sum strays: where all of few results cancel, the rounding
            is still of these.
    """
    assert ours.shape == oracle.shape, (name, ours.shape, oracle.shape)
    oracle = oracle.double()
    ulp = torch.finfo(ours.dtype).eps * oracle.abs().max()
    for addend in addends:  # summed in float32
        ulp = max(ulp, torch.finfo(torch.float32).eps * addend.abs().max())
    error, allowed = (
        (ours.double() - oracle).abs().max(),
        2 * (twin.double() - oracle).abs().max() + 2 * ulp * max(1, terms**0.5 / 2),
    )
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # false for NaN too


def tensor(generator, *shape, dtype=torch.float32):
    """Noise amid NaN."""
    return fenced(torch.randn(shape, generator=generator).to(dtype))


def low_sizes():
    """Height of the low-resolution side of every k4 s2 layer of the family."""
    arches = [Arch(image_size=size) for size in SIZES] + [preset.arch for preset in PRESETS.values()]
    layers = [layer for arch in arches for layer in (*arch.generator, *arch.discriminator) if layer.stride == 2]
    return sorted({min(layer.in_size, layer.out_size) for layer in layers})


EVERY_GEOMETRY = [
    pytest.param(n, tma, marks=[pytest.mark.long] if n > 64 or (n > 16 and not tma) else [], id=f"{n}-{path}")
    for n in low_sizes()
    for tma, path in ((True, "tma"), (False, "pointers"))
]
BOTH_PATHS = pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])


def generated(check, count):
    """Run a hypothesis test on `count` cases, the same each time."""
    quiet = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=count, **quiet)(check)()
