"""The fused step with one of its parts turned off, to measure what each part is worth: an ablation.

`OFF` has one function per part, which changes a `dcgan.fused.FusedStep` over `dcgan.stacks` in place, from outside; the
step computes the same as before, by more launches:

    statistics   batch norm's statistics in a pass over the product's output, not in the product's epilogue
    sums         the activation's derivative and batch norm's two sums likewise, not in the data gradient's epilogue
    merge        the tiles' sums settled by a launch of its own, not by the product's last programs
    deferred     no batch norm applied in a load: every map is written activated
    batched      real and fake through D one after the other, and the two gradients added
    frozen       D's weight gradients computed in G's step too, and thrown away, as the example does
    products     the convolutions by the library (cuDNN), all that is fused with them in passes of its own
    dependent    each kernel launched when the one before it has ended (from capability 9.0 on, where the whole is not)

and, which is nothing inside the step and so not in `OFF`, `graph`: its launches one by one, not as a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dcgan.fused import FusedStep
from dcgan.stacks import Judged, Stack
from kernels.geometry import Deferred, Epilogue
from kernels.library import Products

FORWARD = ("conv", "conv_transpose")


def _relaunch(step: FusedStep, changes: Callable[[SimpleNamespace], dict[str, Callable]]) -> None:
    """Give both stacks the launchers that `changes` makes of theirs."""
    for stack in (step.generator, step.discriminator):
        launch = SimpleNamespace(**vars(stack.launch))
        stack.launch = SimpleNamespace(**vars(launch) | changes(launch))


def _products(launch: SimpleNamespace, wrap: Callable[[Callable, Epilogue], Callable | None]) -> dict[str, Callable]:
    """Both products with an epilogue, each call answered by what `wrap` returns for it, if anything."""

    def changed(inner: Callable) -> Callable:
        def product(x: Any, weight: Tensor, epilogue: Epilogue | None = None, **options: Any) -> Any:
            instead = epilogue and wrap(inner, epilogue)
            return (instead or inner)(x, weight, epilogue, **options)

        return product

    return {name: changed(getattr(launch, name)) for name in FORWARD}


def without_statistics(step: FusedStep) -> None:
    def changes(launch: SimpleNamespace) -> dict[str, Callable]:
        def wrap(inner: Callable, e: Epilogue) -> Callable | None:
            def product(x: Any, weight: Tensor, _: Epilogue, **options: Any) -> Any:
                y, _ = inner(x, weight, Epilogue(groups=e.groups), **options)
                return y, launch.statistics(y, e.groups, e.merge)

            return product if e.mode == "statistics" else None

        return _products(launch, wrap)

    _relaunch(step, changes)


def without_sums(step: FusedStep) -> None:
    def changes(launch: SimpleNamespace) -> dict[str, Callable]:
        def wrap(inner: Callable, e: Epilogue) -> Callable | None:
            def product(x: Any, weight: Tensor, _: Epilogue, **options: Any) -> Any:
                da, _ = inner(x, weight, Epilogue(groups=e.groups), **options)
                return launch.activation_grad(da, e.saved, e.state, e.activation, e.slope)

            return product if e.mode == "batch_norm_grad" else None

        return _products(launch, wrap)

    _relaunch(step, changes)


def without_merge(step: FusedStep) -> None:
    def changes(launch: SimpleNamespace) -> dict[str, Callable]:
        def wrap(inner: Callable, e: Epilogue) -> Callable:
            return lambda x, weight, _, **options: inner(x, weight, replace(e, merge=None), **options)

        return _products(launch, wrap) | {
            "statistics": lambda y, groups=1, merge=None: launch.statistics(y, groups),
            "head_grad": lambda *arguments, **options: launch.head_grad(*arguments, **options | {"merge": None}),
        }

    _relaunch(step, changes)


def without_deferred(step: FusedStep) -> None:
    def applied(stack: Stack) -> Callable[..., Tensor | Deferred]:
        return lambda stage, into, y, state, weights=True: stack.launch.apply(y, state, stage.layer.activation)

    for stack in (step.generator, step.discriminator):
        stack.handed_on = applied(stack)


def without_batched(step: FusedStep) -> None:
    d = step.discriminator
    forward, backward = d.forward, d.backward
    passes: list[tuple] = []

    def one_by_one(images: Tensor, real: tuple[bool, ...], weights: bool) -> Judged:
        passes.clear()
        if len(real) == 1:
            return forward(images, real, weights)
        found = []
        for part, is_real in zip(images.chunk(len(real)), real, strict=True):
            found.append(forward(part, (is_real,), weights))
            passes.append((d.images, d.kept, d.groups))
        return Judged(*(torch.cat(parts, -1) for parts in zip(*found, strict=True)))

    def back(dlogits: Tensor, weights: bool) -> Tensor | None:
        if not passes:
            return backward(dlogits, weights)
        grads, sums = [parameter.grad for parameter in d.model.parameters()], None
        for kept, part in zip(passes, dlogits.chunk(len(passes)), strict=True):
            d.images, d.kept, d.groups = kept
            backward(part.clone(), weights)  # the kernels read whole 16 bytes
            if sums is None:
                sums = [grad.clone() for grad in grads]
            else:
                torch._foreach_add_(grads, sums)
        return None

    d.forward, d.backward = one_by_one, back


def without_frozen(step: FusedStep) -> None:
    d = step.discriminator
    forward, backward, launch = d.forward, d.backward, d.launch
    thrown_away = [torch.empty_like(stage.grad) for stage in d.stages]
    remaining: list[int] = []

    def conv_transpose(dy: Tensor, weight: Tensor, epilogue: Epilogue, **options: Any) -> Any:
        if remaining:
            layer = remaining.pop()
            launch.wgrad(dy, d.kept[layer].x, out=thrown_away[layer], **d.options)
        return launch.conv_transpose(dy, weight, epilogue, **options)

    def head_grad(*arguments: Any, **options: Any) -> Any:
        if remaining:
            options |= {"weight_grad": True, "out": thrown_away[-1]}
        return launch.head_grad(*arguments, **options)

    def back(dlogits: Tensor, weights: bool) -> Tensor | None:
        remaining[:] = [] if weights else range(len(d.stages) - 1)
        return backward(dlogits, weights)

    d.launch = SimpleNamespace(**vars(launch) | {"conv_transpose": conv_transpose, "head_grad": head_grad})
    d.forward = lambda images, real, weights: forward(images, real, weights=True)
    d.backward = back


def without_products(step: FusedStep) -> None:
    without_deferred(step)  # or the library's would apply a map for each who reads it

    def changes(launch: SimpleNamespace) -> dict[str, Callable]:
        library = Products(launch)
        return {"conv": library.conv, "conv_transpose": library.conv_transpose, "wgrad": library.wgrad}

    _relaunch(step, changes)


def without_dependent(step: FusedStep) -> None:
    step.dependent = False


OFF: dict[str, Callable[[FusedStep], None]] = {
    "statistics": without_statistics,
    "sums": without_sums,
    "merge": without_merge,
    "deferred": without_deferred,
    "batched": without_batched,
    "frozen": without_frozen,
    "products": without_products,
    "dependent": without_dependent,
}
GRAPH = "graph"
PARTS = (GRAPH, *OFF)
"""All that can be turned off, one at a time."""
