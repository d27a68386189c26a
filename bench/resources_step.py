"""The Triton launches of a training step on meta tensors, for `bench.resources` to compile."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dcgan.arch import Arch
from kernels import tuning
from kernels._triton import batch_norm, batch_norm_grad
from kernels._triton.adam import adam_table, prepare_adam
from kernels._triton.conv import prepare_conv
from kernels._triton.conv_transpose import prepare_conv_transpose
from kernels._triton.gather import prepare_gather
from kernels._triton.head import prepare_gan_loss, prepare_head, prepare_head_grad
from kernels._triton.launch import Job, Launch
from kernels._triton.wgrad import prepare_sum_shares, prepare_wgrad
from kernels.geometry import Deferred, Epilogue, Layer, Merge, MergeGradients

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A launch to compile, what to call it, and whether it must run on the tensor cores."""

    name: str
    launch: Launch
    matrix: bool


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _maps(layer: Layer, images: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's input, output and packed weight (low, 4, 4, high), only as shapes."""
    x = _meta(images, layer.in_size, layer.in_size, layer.in_channels, dtype=dtype)
    y = _meta(images, layer.out_size, layer.out_size, layer.out_channels, dtype=dtype)
    out, into, r, s = layer.weight_shape
    return x, y, _meta(out, r, s, into, dtype=dtype)


def _inputs(
    before: Layer | None, layer: Layer, x: torch.Tensor, groups: int, precision: str, weights: bool
) -> Iterator[tuple[str, torch.Tensor | Deferred, bool]]:  # fmt: skip
    """A layer's input, with what a row's name says of it: as a step has it by default, which the last value tells, and
    as a table may have it."""
    deferred = False
    if before is not None and before.batch_norm:
        state = _meta(4, groups, layer.in_channels, dtype=torch.float32)
        deferred = tuning.deferred(None, layer, precision, len(x), weights)[0]
        yield ", deferred", Deferred(x, state, before.activation), deferred
    yield (", applied" if deferred else ""), x, not deferred


def _network(
    layers: tuple[Layer, ...], images: int, groups: int, weights: bool, sm: int, precision: str
) -> Iterator[Case]:
    """The launches of one network's k4 s2 layers and batch norms, forward and backward, at `images` a group."""
    dtype, pending = PRECISIONS[precision], []
    options = {"arch": sm, "precision": "tf32" if precision == "tf32" else "ieee"}
    for before, layer in zip((None, *layers), layers, strict=False):
        x, y, weight = _maps(layer, images * groups, dtype)
        label = f"{layer.name} {groups}×{images}"
        matrix = dtype != torch.float32 and min(layer.in_channels, layer.out_channels) > 4

        def cases(name: str, job: Job, matrix: bool, label: str = label) -> Iterator[Case]:
            for position, launch in enumerate(job.launches):
                yield Case(f"{label} {name}", launch, matrix and not position)

        if layer.stride == 2:
            forward, backward = prepare_conv, prepare_conv_transpose
            if layer.kind == "conv_transpose":
                forward, backward = backward, forward
            after = Epilogue(layer.activation, groups=groups)
            if layer.batch_norm:
                vector = _meta(layer.out_channels, dtype=torch.float32)
                merge = Merge(vector, vector, vector, vector, _meta(dtype=torch.int64))
                after = Epilogue(groups=groups, statistics=True, merge=merge)
            for way, given, ships in _inputs(before, layer, x, groups, precision, weights):
                yield from cases(f"forward{way}", forward(given, weight, after, **options), matrix)
                if weights:
                    low, high = (y, given) if layer.kind == "conv" else (given, y)
                    job = prepare_wgrad(low, high, pending=pending if ships else [], **options)
                    yield from cases(f"wgrad{way}", job, matrix)
            if layer.batch_norm and layer.kind == "conv_transpose":  # as sampling runs it
                state = _meta(4, groups, layer.out_channels, dtype=torch.float32)
                given = Epilogue(layer.activation, groups=groups, state=state)
                yield from cases("evaluation", forward(x, weight, given, **options), matrix)
            if before is not None:
                into = Epilogue(before.activation, groups=groups, saved=x)
                if before.batch_norm:
                    state = _meta(4, groups, layer.in_channels, dtype=torch.float32)
                    merge = MergeGradients(state[0, 0], state[0, 0]) if weights else MergeGradients()
                    into = replace(into, state=state, merge=merge)
                yield from cases("dgrad", backward(y, weight, into, **options), matrix)
            elif not weights:  # D frozen in G's step: the images' gradient is wanted, through the tanh that made them
                yield from cases("dgrad", backward(y, weight, Epilogue("tanh", saved=x), **options), matrix)
        if layer.batch_norm:
            state = _meta(4, groups, layer.out_channels, dtype=torch.float32)
            means, vector = _meta(2, groups, layer.out_channels, dtype=torch.float32), state[0, 0]
            rows = images * layer.out_size**2
            measured, (_, sums) = (
                batch_norm.prepare_statistics(y, groups),
                batch_norm_grad.prepare_activation_grad(y, y, state, layer.activation).result,
            )
            tracked = _meta(dtype=torch.int64)
            merge = batch_norm.prepare_merge_statistics(measured.result, vector, vector, vector, vector, tracked)
            yield from cases("statistics", measured, False)
            yield from cases("merge_statistics", merge, False)
            yield from cases("apply", batch_norm.prepare_apply(y, state, layer.activation), False)
            grad = batch_norm_grad.prepare_activation_grad(y, y, state, layer.activation)
            yield from cases("activation_grad", grad, False)
            yield from cases("merge_sums", batch_norm_grad.prepare_merge_sums(sums, rows), False)
            yield from cases("apply_grad", batch_norm_grad.prepare_apply_grad(y, y, state, means), False)
    for launch in prepare_sum_shares(pending).launches:
        yield Case(f"{layers[0].name[0]} {groups}×{images} sum_shares", launch, False)


def _others(arch: Arch, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """The launches that belong to no convolution: the gather, D's head in its forms, the loss, Adam."""
    counter = _meta(dtype=torch.int64)
    rows = _meta(60000, arch.image_size, arch.image_size, arch.channels, dtype=torch.uint8)
    permutation, flip = _meta(60000, dtype=torch.int64), _meta(60000, dtype=torch.uint8)
    jobs = {
        "gather": prepare_gather(rows, permutation, counter, batch, None, dtype),
        "gather, mirrored": prepare_gather(rows, permutation, counter, batch, flip, dtype),
    }
    last = arch.discriminator[-1]
    weight = _maps(last, 1, dtype)[2]
    for real in ((True, False), (True,)):
        groups = len(real)
        y = _meta(batch * groups, last.in_size, last.in_size, last.in_channels, dtype=dtype)
        state = _meta(4, groups, last.in_channels, dtype=torch.float32)
        job = prepare_head(y, weight, state, real)
        jobs[f"D head {groups}×{batch}"] = job
        grad = prepare_head_grad(y, weight, state, job.result[1], weight_grad=groups == 2)
        jobs[f"D head {groups}×{batch} backward"] = grad
    shapes = [layer.weight_shape for layer in arch.discriminator]
    tensors = [_meta(*shape, dtype=torch.float32) for shape in shapes]
    copies = [_meta(*shape, dtype=dtype if dtype.itemsize == 2 else torch.bfloat16) for shape in shapes]
    table, scale = adam_table(tensors, tensors, tensors, tensors, copies), _meta(3, dtype=torch.float32)
    jobs["Adam"] = prepare_adam(table, counter, 2e-4)
    jobs["Adam, scaled"] = prepare_adam(table, counter, 2e-4, loss_scale=scale)
    jobs["gan_loss"] = prepare_gan_loss(_meta(2 * batch, dtype=torch.float32), (True, False))
    for name, job in jobs.items():
        for launch in job.launches:
            yield Case(name, launch, False)


def step_cases(arch: Arch, batch: int, sm: int, precision: str = "bf16") -> Iterator[Case]:
    """Every launch of a training step at `batch` images, and of sampling as many, in the configuration that ships for
    capability `sm`.

    A layer's input has its batch norm applied by default in the load where there is an `applied` to choose, and by a
    launch before where there is a `deferred`: a table may choose either.
    """
    yield from _network(arch.generator, batch, 1, True, sm, precision)
    yield from _network(arch.discriminator, batch, 2, True, sm, precision)
    yield from _network(arch.discriminator, batch, 1, False, sm, precision)
    yield from _others(arch, batch, PRECISIONS[precision])
