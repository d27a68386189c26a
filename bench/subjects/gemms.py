"""The three GEMM kernels of a step as subjects: conv, conv_transpose and wgrad, with the epilogues the step gives them.

Recipes: `triton` (on tuned tiles where the device has any) and `cuda` are the launchers; `library` is cuDNN's product
in channels_last memory and then our own elementwise kernels for what the epilogue would have done; `eager` is PyTorch
throughout, and on a CPU that is the library. So all of them end with the same tensors, and their times compare. Where
an input's batch norm is deferred, the library and PyTorch apply it first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.subjects.accuracy import KINK, Answers, Noise, Outputs, Subject, arithmetic, sums_slack, walk
from bench.subjects.problems import Problem, Use
from kernels import reference
from kernels.geometry import CudaConfig, Deferred, Epilogue, Merge, MergeGradients, Partials, nchw, nhwc, raw
from kernels.launchers import launchers


@dataclass(frozen=True)
class Operands:
    """A problem's tensors, NHWC: x and weight (packed), or low and high; and its epilogue."""

    first: Tensor | Deferred
    second: Tensor | Deferred
    epilogue: Epilogue | None

    def settled(self, apply: Callable[..., Tensor] = reference.apply) -> "Operands":
        """With the input's batch norm applied."""
        ends = [apply(*t) if isinstance(t, Deferred) else t for t in (self.first, self.second)]
        return Operands(*ends, self.epilogue)

    def double(self) -> "Operands":
        """In float64; a deferred batch norm is applied and rounded first, as every recipe rounds it."""
        o, e = self.settled(), self.epilogue
        if e is not None:
            parts = {name: t.double() for name in ("saved", "state") if (t := getattr(e, name)) is not None}
            e = replace(e, **parts, merge=e.merge and type(e.merge)(*map(doubled, e.merge)))
        return Operands(o.first.double(), o.second.double(), e)

    def fresh(self) -> "Operands":
        """With clones of what `merge` moves."""
        merge = self.epilogue.merge if self.epilogue is not None else None
        if merge is None:
            return self
        merge = type(merge)(*(t.clone() if isinstance(t, Tensor) else t for t in merge))
        return replace(self, epilogue=replace(self.epilogue, merge=merge))


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def operands(problem: Problem, device: torch.device, seed: int = 0) -> Operands:
    """Noise; outputs of the order of 1. What was saved for a gradient lies nowhere near an activation's kink."""
    p, noise = problem, Noise(device, problem.precision, seed)
    high, low = (p.images, 2 * p.low, 2 * p.low), (p.images, p.low, p.low)
    if p.kernel == "wgrad":
        maps = {"low": noise(*low, p.into), "high": noise(*high, p.out)}
        if p.use.before:
            maps[p.use.before.side] = deferred(p.use, maps[p.use.before.side], noise)
        return Operands(*maps.values(), None)
    weight = noise(*((p.out, 4, 4, p.into) if p.kernel == "conv" else (p.into, 4, 4, p.out)), scale=0.3 / p.into**0.5)
    x = noise(*(high if p.kernel == "conv" else low), p.into)
    x = deferred(p.use, x, noise) if p.use.before else x
    shape = (*(low if p.kernel == "conv" else high), p.out)
    return Operands(x, weight, epilogue_of(p.use, shape, noise, p.precision))


def deferred(use: Use, y: Tensor, noise: Noise) -> Deferred:
    """y before a batch norm whose shift is far from 0, so that padding which had it would show."""
    state = random_state(noise, use.groups, y.shape[3])
    state[3] += 2
    return Deferred(y, state, use.before.activation)


def epilogue_of(use: Use, shape: tuple[int, ...], noise: Noise, precision: str) -> Epilogue:
    if use.mode == "statistics":
        merge = None
        if use.merge:
            c, single = shape[3], noise.single
            tracked = torch.zeros((), dtype=torch.int64, device=noise.device)
            merge = Merge(1 + single(c, scale=0.1), single(c, scale=0.1), single(c), single(c).abs() + 0.5, tracked)
        return Epilogue(statistics=True, groups=use.groups, merge=merge)
    if use.mode == "activation":
        return Epilogue(use.activation, groups=use.groups)
    if use.mode == "batch_norm":
        return Epilogue(use.activation, groups=use.groups, state=random_state(noise, use.groups, shape[3]))
    saved = noise(*shape)
    if use.mode == "activation_grad":
        saved = saved.tanh_() if use.activation == "tanh" else off_the_kink(saved, saved, precision)
        return Epilogue(use.activation, groups=use.groups, saved=saved)
    state = random_state(noise, use.groups, shape[3])
    _, _, scale, shift = state[:, :, None]
    z = reference.grouped(saved, use.groups) * scale + shift
    saved = off_the_kink(saved, z.view(shape), precision)
    merge = MergeGradients(noise.single(shape[3]), noise.single(shape[3])) if use.merge else None  # written over
    return Epilogue(use.activation, groups=use.groups, saved=saved, state=state, merge=merge)


def random_state(noise: Noise, groups: int, channels: int) -> Tensor:
    """A batch-norm state (4, groups, C) as of maps of mean 0 and variance 1, roughly."""
    mean, spread = noise.single(groups, channels, scale=0.1), noise.single(groups, channels, scale=0.1)
    rstd = 1 + spread.abs()
    scale = rstd * (1 + noise.single(groups, channels, scale=0.1).abs())
    return torch.stack([mean, rstd, scale, noise.single(groups, channels, scale=0.1) - mean * scale])


def off_the_kink(values: Tensor, z: Tensor, precision: str) -> Tensor:
    """`values` with 1 wherever z, which they make, is near 0."""
    return torch.where(z.abs() < KINK[precision], torch.ones_like(values), values)


def merged(partials: Partials | None, mode: str) -> Outputs:
    """What the tiles left, as one tile per group would have it: by Chan's formula, in float64."""
    if partials is None:
        return {}
    values = partials.values.double()
    if partials.counts is None:
        return {"sum of g": values[0].sum(1), "sum of g·x̂": values[1].sum(1)}
    counts = partials.counts.double()[:, :, None]
    mean = (counts * values[0]).sum(1) / counts.sum(1)
    m2 = (values[1] + counts * (values[0] - mean[:, None]).square()).sum(1)
    return {"mean": mean, "M2": m2}


def build(problem: Problem, device: torch.device, configs: Mapping[str, Any] | None = None) -> Subject:
    """The subject of a problem; each of `configs` is a tile, of Triton's launcher or the extension's, and a recipe by
    its name here."""
    p, o = problem, operands(problem, device)
    products: dict[str, Product] = {
        recipe: partial(launched, recipe=recipe) for recipe in ("library", "triton", "cuda")
    }
    products["library" if device.type == "cpu" else "eager"] = plain
    products |= {recipe: partial(tiled, config=config) for recipe, config in (configs or {}).items()}
    runs = {recipe: partial(outputs, p, o, call) for recipe, call in products.items()}
    timed = {recipe: partial(settled, p, o, call) for recipe, call in products.items()}
    return Subject(runs, lambda: answers(p, o), p.precision, timed)


Product = Callable[[Problem, Operands], Any]


def settled(p: Problem, o: Operands, call: Product) -> tuple[Any, Any]:
    """A product with its epilogue; what a backend leaves to its caller is merged here (nothing, after `wgrad`)."""
    if p.kernel == "wgrad":
        return call(p, o), None
    y, found = call(p, o)
    e = o.epilogue
    if e.merge is None or isinstance(found, Tensor):
        return y, found
    launch = launchers("triton") if y.device.type == "cuda" and call is not plain else reference
    if p.use.mode == "statistics":
        return y, launch.merge_statistics(found, *e.merge)
    _, _, means = launch.merge_sums(found, y[..., 0].numel() // e.groups, e.merge.out)
    return y, means


def outputs(p: Problem, o: Operands, call: Product) -> Outputs:
    """All that a product makes or moves, by name."""
    o = o.fresh()
    y, found = settled(p, o, call)
    if p.kernel == "wgrad":
        return {"dw": y}
    if not p.use.merge:
        return {"y": y, **merged(found, p.use.mode)}
    merge = o.epilogue.merge
    if p.use.mode == "statistics":
        moved = {"running_mean": merge.running_mean, "running_var": merge.running_var}
        return {"y": y, "state": found, **moved, "tracked": merge.tracked.double()}
    return {"y": y, "means": found, "dweight": merge.dweight, "dbias": merge.dbias}


def tiled(p: Problem, o: Operands, config: Any) -> Any:
    if isinstance(config, CudaConfig):
        return launched(p, o, "cuda", config=config)
    return job(p, o, config).run()


def job(p: Problem, o: Operands, config: Any = None, arch: int | None = None) -> Any:
    """The Triton launcher's job for these operands."""
    from kernels._triton.conv import prepare_conv
    from kernels._triton.conv_transpose import prepare_conv_transpose
    from kernels._triton.wgrad import prepare_wgrad

    options = {"precision": "tf32" if p.precision == "tf32" else "ieee", "config": config, "arch": arch}
    if p.kernel == "wgrad":
        return prepare_wgrad(o.first, o.second, **options)
    prepare = prepare_conv if p.kernel == "conv" else prepare_conv_transpose
    return prepare(o.first, o.second, o.epilogue, **options)


def applied_first(call: Product) -> Product:
    """The same product of a map that a launch of its own has applied the batch norm to."""

    return lambda p, o: call(p, o.settled(reference.apply if call is plain else launchers("triton").apply))


def other_bits(problem: Problem, device: torch.device, config: Any) -> str | None:
    """What has other bits where a tile applies the input's batch norm in its load than where it was applied before."""
    o, call = operands(problem, device), partial(tiled, config=config)
    with arithmetic(problem.precision):
        fused, apart = outputs(problem, o, call), outputs(problem, o, applied_first(call))
    other = [name for name, t in apart.items() if not torch.equal(t, fused[name])]
    return f"other bits than applied first: {', '.join(other)}" if other else None


def launched(p: Problem, o: Operands, recipe: str, **options: Any) -> Any:
    """By a backend's launchers, at their own choice of tile unless told."""
    launch, options = launchers(recipe), options | {"precision": "tf32" if p.precision == "tf32" else "ieee"}
    if p.kernel == "wgrad":
        return launch.wgrad(o.first, o.second, **options)
    return getattr(launch, p.kernel)(o.first, o.second, o.epilogue, **options)


def product(p: Problem, o: Operands) -> Tensor:
    """The bare product by the library, NHWC: the raw output, or the weight's gradient in the operands' type."""
    if p.kernel == "wgrad":
        low, high = nchw(o.first), nchw(o.second)
        shape = low.new_empty((p.into, p.out, 4, 4)).contiguous(memory_format=torch.channels_last)
        gradient = torch.ops.aten.convolution_backward(
            low, high, shape, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        )[1]
        return nhwc(gradient).contiguous()
    convolution = F.conv2d if p.kernel == "conv" else F.conv_transpose2d
    return nhwc(convolution(nchw(o.first), nchw(o.second), stride=2, padding=1)).contiguous()


def plain(p: Problem, o: Operands) -> Any:
    """PyTorch's own operations, in the operands' type."""
    y = product(p, o.settled())
    if p.kernel == "wgrad":
        return y if y.dtype == torch.float64 else y.float()
    return reference.finish(y, o.epilogue)


def answers(p: Problem, o: Operands) -> Answers:
    oracle, mine, single = outputs(p, o.double(), plain), outputs(p, o, plain), torch.float32
    if p.kernel == "wgrad":
        return Answers(oracle, mine, {"dw": walk(p.images * p.low**2, single, oracle["dw"].abs().max().item())})
    pixels = p.images * p.low**2 // p.use.groups * (1 if p.kernel == "conv" else 4)
    largest = oracle["y"].abs().max().item()
    terms = (16 if p.kernel == "conv" else 4) * p.into
    rounding = 2 * torch.finfo(raw(o.first).dtype).eps * largest  # once, of an accumulator in float32
    slack = {"y": max(rounding, walk(terms, single, largest))} | sums_slack(oracle, pixels, largest)
    sums = 64 * torch.finfo(single).eps * pixels**0.5 * largest  # 8 ulp of terms that are at most 8 times as large
    slack |= {"dweight": sums, "dbias": sums, "means": sums / pixels}
    for name in oracle.keys() & {"state", "running_mean", "running_var"}:
        slack[name] = 8 * torch.finfo(single).eps * max(1.0, largest, oracle[name].abs().max().item())
    return Answers(oracle, mine, slack)
