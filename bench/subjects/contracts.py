"""What a public op promises beside its numbers: the same bits each time, registration, compilation, graph capture.

Each function takes a work of `bench.subjects.layers` or `bench.subjects.whole` and a recipe, and returns why the
promise is broken, None if it is kept. They run on any device but for the capture, which needs CUDA graphs (not yet
run on a GPU).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.subjects import layers, whole
from bench.subjects.accuracy import DTYPES, Noise, Outputs, Subject, arithmetic
from kernels import engine

SLOPE = layers.SLOPE


def repeats(subject: Subject, recipe: str, times: int) -> str | None:
    """`times` runs from the same inputs give the same bits."""
    with arithmetic(subject.precision):
        first = {name: t.clone() for name, t in subject.runs[recipe]().items()}
        for number in range(1, times):
            again = subject.runs[recipe]()
            other = [name for name, t in first.items() if not torch.equal(t, again[name])]
            if other:
                return f"run {number + 1} of {times} differs in {', '.join(other)}"
    return None


def registration(op: layers.Op, recipe: str, device: torch.device) -> str | None:
    """`torch.library.opcheck` of the forward and the backward behind a convolution op, as autograd calls them."""
    i, layer = layers.Inputs.make(op, device), op.layer
    settings = (layer.stride, layer.padding, layer.activation, SLOPE)
    name = "bn_act" if layer.batch_norm else "act"
    forward, backward = (engine.op(layer.kind, f"{name}{suffix}") for suffix in ("", "_backward"))
    with arithmetic(op.precision):
        if layer.batch_norm:
            arguments = (i.x, i.weight, *i.norm, *i.running, *settings, op.groups, 0.1, 1e-5, recipe)
            _, y, state = forward(i.x, i.weight, *i.norm, None, None, None, *settings, op.groups, 0.1, 1e-5, recipe)
            saved: tuple[Tensor, ...] = (i.x, i.weight, y, state)
        else:
            arguments = (i.x, i.weight, *settings, recipe)
            saved = (i.x, i.weight, forward(*arguments))
        torch.library.opcheck(forward, arguments)
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(backward, (i.grad, *saved, *settings, *wanted, recipe))
    return None


def registration_of_whole(work: whole.Whole, recipe: str, device: torch.device) -> str | None:
    """The same of a public op without a convolution."""
    i = whole.INPUTS[work.op](work, Noise(device, work.precision))
    ops = torch.ops.dcgan_kernels
    if work.op == "gan_loss":
        torch.library.opcheck(ops.gan_loss.default, (i["logits"], list(i["real"]), recipe))
    elif work.op == "gather_images":
        channels = i["rows"].shape[3]
        arguments = (i["rows"], i["permutation"], i["cursor"], i["batch"], i["flip"], i["dtype"], channels, recipe)
        torch.library.opcheck(ops.gather_images.default, arguments)
    else:
        numbers = (i["step"], None, whole.LR, *whole.BETAS, 1e-8, True, recipe)
        copied = list(range(len(i["copies"])))
        torch.library.opcheck(ops.adam_step.default, (*i["lists"], i["copies"], copied, *numbers))
    return None


def compiled(op: layers.Op, recipe: str, device: torch.device) -> str | None:
    """`torch.compile(fullgraph=True)` of forward and backward gives what the op gives: by the inductor on a GPU; on a
    CPU by `aot_eager`, which needs no compiler."""
    i = layers.Inputs.make(op, device)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return layers.fused(op, recipe, x, weight, i.norm, [t.clone() for t in i.running])

    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    found = []
    with arithmetic(op.precision):
        for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
            leaves = [t.detach().clone().requires_grad_() for t in (i.x, i.weight)]
            y = function(*leaves)
            found.append([y.detach(), *torch.autograd.grad(y, leaves, i.grad)])
    expected, got = (dict(zip("yxw", tensors, strict=True)) for tensors in found)
    return difference(expected, got, op.precision, ULPS if recipe in OURS else 16 * ULPS)


OURS = ("triton", "cuda")
ULPS = 4.0
"""How far one answer may be from another where not its bits are promised: PyTorch's own operations, which compilers
fuse with other roundings and libraries sum in any order, get sixteen times as much."""


def difference(expected: Outputs, got: Outputs, precision: str, ulps: float) -> str | None:
    """Where two answers are further apart than `ulps` units in the last place of the largest element; 0 for the same
    bits. The unit is that of the maps: gradients in float32 are made of them."""
    for name, value in expected.items():
        apart = (got[name].double() - value.double()).abs().max().item()
        allowed = ulps * torch.finfo(DTYPES[precision]).eps * value.double().abs().max().item()
        if not apart <= allowed:
            return f"{name} differs by {apart:.3g}, allowed {allowed:.3g}"
    return None


def captured(op: layers.Op, recipe: str, device: torch.device) -> str | None:
    """Forward and backward in one CUDA graph: replayed on the inputs of the capture and then on others, it gives what
    the op gives, in ours the same bits."""
    i = layers.Inputs.make(op, device)
    leaves = [t.detach().clone().requires_grad_() for t in (i.x, i.weight, *i.norm)]
    running = [t.clone() for t in i.running]

    def work() -> list[Tensor]:
        y = layers.fused(op, recipe, *leaves[:2], tuple(leaves[2:]), running)
        return [y.detach(), *torch.autograd.grad(y, leaves, i.grad)]

    def numbered(tensors: list[Tensor]) -> Outputs:
        found = {f"output {k}": t.clone() for k, t in enumerate([*tensors, *running])}
        for now, start in zip(running, i.running, strict=True):
            now.copy_(start)
        return found

    with arithmetic(op.precision):
        graph, results = capture(work, device)
        numbered(results)
        for inputs in ("the inputs of the capture", "other inputs"):
            graph.replay()
            replayed = numbered(results)
            why = difference(numbered(work()), replayed, op.precision, 0.0 if recipe in OURS else 16 * ULPS)
            if why:
                return f"a replay on {inputs}: {why}"
            with torch.no_grad():
                leaves[0].copy_(leaves[0].flip(0) * 0.5)
    return None


def captured_whole(work: whole.Whole, recipe: str, device: torch.device) -> str | None:
    """A public op without a convolution in a CUDA graph: a replay moves its state and gives what a call gives."""
    i = whole.INPUTS[work.op](work, Noise(device, work.precision))
    own, call = whole.cloned(i), whole.CALLS[work.op]
    graph, results = capture(lambda: call(own, recipe), device)
    restore(own, i)
    graph.replay()
    return difference(call(whole.cloned(i), recipe), results, work.precision, 0.0 if recipe in OURS else ULPS)


def restore(now: Any, start: Any) -> None:
    """Copy tensors back, wherever they are."""
    if isinstance(now, Tensor):
        now.copy_(start)
    elif isinstance(now, (list, tuple)):
        for a, b in zip(now, start, strict=True):
            restore(a, b)
    elif isinstance(now, dict):
        for name, value in now.items():
            restore(value, start[name])


def capture(work: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `work`, which has run before on another stream, and what it returns there."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = work()
    return graph, results
