"""What every op checks before it runs: one clear error that names the argument, and never a wrong number."""

from collections.abc import Sequence
from math import inf
from numbers import Integral, Rational, Real

import torch
from torch import Tensor

from kernels.geometry import Layer

HALVES = (torch.bfloat16, torch.float16)
WHOLE = (Integral, torch.SymInt)
REAL = (Real, torch.SymInt, torch.SymFloat)
"""What a number may be: NumPy's too, and the symbols that torch.compile has for some."""
LISTS = (Sequence, torch.nn.ParameterList)
ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh")


def autocast(x: Tensor) -> Tensor:
    """x in the type that autocast asks for on its device; x itself outside autocast."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_layer(
    kind: str, x: Tensor, weight: Tensor, stride: int, padding: int, activation: str, slope: float, batch_norm: bool
) -> Layer:
    """The geometry of a call.

    Args:
        kind: `conv` or `conv_transpose`.
        x: (N, C, H, W); weight: (out, C, R, R), or (C, out, R, R) for `conv_transpose`.

    Raises:
        ValueError, TypeError: an argument, by name, with what was given and what is accepted.
    """
    check_tensors(x=x, weight=weight)
    _check_whole(stride=stride, padding=padding)
    _check_numbers(negative_slope=slope)
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected four dimensions")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected a floating-point tensor")
    if x.device != weight.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: expected one device")
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.numel():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must not be empty")
    if x.shape[2] != x.shape[3] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: expected square images and square kernels"
        )
    into, out = (weight.shape[1], weight.shape[0]) if kind == "conv" else (weight.shape[0], weight.shape[1])
    if x.shape[1] != into:
        raise ValueError(f"x has {x.shape[1]} channels, weight {tuple(weight.shape)} takes {into}")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride is {stride}, padding is {padding}: accepted are stride from 1, padding from 0")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: accepted are {', '.join(ACTIVATIONS)}")
    if batch_norm and activation == "tanh":
        raise ValueError("activation is 'tanh': after batch norm, accepted are none, relu and leaky_relu")
    if not 0 <= slope <= 1:
        raise ValueError(f"negative_slope is {slope}: accepted are 0 to 1")
    layer = Layer(
        "layer", kind, into, out, x.shape[2], weight.shape[2], stride, padding, batch_norm, activation
    )  # fmt: skip
    if layer.out_size < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: smaller than the kernel of {layer.kernel}")
    return layer


def check_batch_norm(
    x: Tensor, layer: Layer, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    tracked: Tensor | None, groups: int, training: bool, momentum: float, eps: float,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError where batch norm's tensors do not fit `layer` or x, cast as autocast asks, where
    `groups` does not divide the batch, or momentum or eps is no number."""
    vectors = {"bn_weight": gamma, "bn_bias": beta, "running_mean": running_mean, "running_var": running_var}
    check_tensors(bn_weight=gamma, bn_bias=beta)
    _check_optional(running_mean=running_mean, running_var=running_var, num_batches_tracked=tracked)
    _check_whole(groups=groups)
    _check_numbers(momentum=momentum, eps=eps)
    if not isinstance(training, bool):
        raise TypeError(f"training is {training!r}: expected True or False")
    if not 0 <= momentum <= 1 or not 0 <= eps < inf:  # which NaN is not either
        raise ValueError(f"momentum is {momentum}, eps is {eps}: accepted are 0 to 1, and finite from 0")
    for name, vector in vectors.items():
        if vector is not None and (tuple(vector.shape) != (layer.out_channels,) or vector.device != x.device):
            got = f"{tuple(vector.shape)} on {vector.device}"
            raise ValueError(f"{name} is {got}: expected ({layer.out_channels},) on {x.device}")
        if vector is not None and vector.dtype != gamma.dtype:
            raise TypeError(f"{name} is {vector.dtype}, bn_weight {gamma.dtype}: expected one type")
    accepted = (x.dtype,) if x.dtype in (torch.float64, torch.float32) else (torch.float32, x.dtype)
    if gamma.dtype not in accepted:
        raise TypeError(
            f"bn_weight is {gamma.dtype}: with an x of {x.dtype} expected {' or '.join(map(str, accepted))}"
        )
    if tracked is not None and (tracked.dtype != torch.int64 or tracked.ndim or tracked.device != x.device):
        got = f"{tracked.dtype} {tuple(tracked.shape)} on {tracked.device}"
        raise ValueError(f"num_batches_tracked is {got}: expected torch.int64 () on {x.device}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: give both or neither")
    if not training and running_mean is None:
        raise ValueError("running_mean is None: needed where training=False")
    if groups < 1 or x.shape[0] % groups:
        raise ValueError(f"groups is {groups}: it must divide the batch of {x.shape[0]}")
    if training and x.shape[0] // groups * layer.out_size**2 < 2:
        raise ValueError("a group has 1 value per channel: training-mode batch norm needs at least 2")


def check_tensors(**tensors: object) -> None:
    """Raise TypeError for the first that is no tensor, by name."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {value!r}: expected a tensor")


def check_lists(**lists: object) -> None:
    """Raise TypeError for the first that is no list or tuple, by name."""
    for name, value in lists.items():
        if not isinstance(value, LISTS):
            raise TypeError(f"{name} is {value!r}: expected a list of tensors")


def _check_optional(**tensors: object) -> None:
    """As `check_tensors`; None will do."""
    check_tensors(**{name: value for name, value in tensors.items() if value is not None})


def _check_whole(**numbers: object) -> None:
    """Raise TypeError for the first that is no whole number, by name."""
    for name, value in numbers.items():
        if not isinstance(value, WHOLE) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}: expected a whole number")


def _check_numbers(**numbers: object) -> None:
    """Raise TypeError for the first that is no number, by name."""
    for name, value in numbers.items():
        fraction = isinstance(value, Rational) and not isinstance(value, Integral)  # PyTorch takes none
        if not isinstance(value, REAL) or fraction:
            raise TypeError(f"{name} is {value!r}: expected a number")


def check_gan_loss(logits: Tensor, real: Sequence[bool]) -> tuple[bool, ...]:
    """`real` as a tuple, once logits (N,) are that many equal groups; ValueError or TypeError where they are not."""
    check_tensors(logits=logits)
    if logits.ndim != 1:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (N,)")
    if not logits.is_floating_point():
        raise TypeError(f"logits is {logits.dtype}: expected a floating-point tensor")
    if not logits.shape[0]:
        raise ValueError("logits has shape (0,): it must not be empty")
    if not isinstance(real, Sequence) or not all(isinstance(is_real, bool) for is_real in real):
        raise TypeError(f"real is {real!r}: expected a bool for each group, as (True, False) for [real | fake]")
    if not 1 <= len(real) <= 31 or logits.shape[0] % len(real):
        raise ValueError(f"real has {len(real)} entries: they must divide the {logits.shape[0]} logits, and be 1 to 31")
    return tuple(real)


def check_gather(
    rows: Tensor, permutation: Tensor, cursor: Tensor, batch: int, flip: Tensor | None, dtype: torch.dtype,
    channels: int | None,
) -> int:  # fmt: skip
    """The result's channels; ValueError or TypeError where an argument of `gather_images` does not fit."""
    check_tensors(rows=rows, permutation=permutation, cursor=cursor)
    _check_optional(flip=flip)
    _check_whole(batch=batch)
    if rows.dtype != torch.uint8:
        raise TypeError(f"rows is {rows.dtype}: expected uint8")
    if rows.ndim != 4 or not rows.is_contiguous() or not rows.numel():
        raise ValueError(
            f"rows has shape {tuple(rows.shape)} and strides {rows.stride()}: expected contiguous (rows, H, W, C), "
            "not empty"
        )
    if permutation.ndim != 1 or not permutation.shape[0]:
        raise ValueError(f"permutation has shape {tuple(permutation.shape)}: expected (length,), not empty")
    expected = {
        "permutation": (permutation, torch.int64, tuple(permutation.shape)),
        "cursor": (cursor, torch.int64, ()),
        "flip": (flip, torch.uint8, tuple(permutation.shape)),
    }
    for name, (tensor, kind, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != kind:
            raise TypeError(f"{name} is {tensor.dtype}: expected {kind}")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != rows.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, on {tensor.device}: "
                f"expected contiguous {shape} on {rows.device}"
            )
    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype is {dtype}: accepted are bfloat16, float16 and float32")
    channels = rows.shape[3] if channels is None else channels
    _check_whole(channels=channels)
    if channels < rows.shape[3]:
        raise ValueError(f"channels is {channels}: rows have {rows.shape[3]}, and no fewer are accepted")
    return channels


def check_adam(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None], step: Tensor, lr: float, betas: tuple[float, float], eps: float,
    loss_scale: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError where an argument of `adam_step` does not fit."""
    check_tensors(step=step)
    _check_optional(loss_scale=loss_scale, **{f"copies[{index}]": copy for index, copy in enumerate(copies)})
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise TypeError(f"betas is {betas!r}: expected two numbers")
    _check_numbers(lr=lr, **{"betas[0]": betas[0], "betas[1]": betas[1]}, eps=eps)
    if not params:
        raise ValueError("params is empty: there is nothing to update")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "copies": copies}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors: expected {len(params)}, one per parameter")
        for index, (tensor, parameter) in enumerate(zip(tensors, params, strict=True)):
            if tensor is not None:
                _check_beside(f"{name}[{index}]", tensor, parameter, params[0], half=name == "copies")
    halves = {copy.dtype for copy in copies if copy is not None}
    if len(halves) > 1:
        raise TypeError(f"copies are of {sorted(map(str, halves))}: expected one type")
    small = {"step": (step, (), (torch.int64, torch.float32)), "loss_scale": (loss_scale, (3,), (torch.float32,))}
    for name, (tensor, shape, kinds) in small.items():
        if tensor is None:
            continue
        if tensor.dtype not in kinds:
            raise TypeError(f"{name} is {tensor.dtype}: expected {' or '.join(map(str, kinds))}")
        if tuple(tensor.shape) != shape or tensor.device != params[0].device:
            got = f"{tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} is {got}: expected {shape} on {params[0].device}")
    for name, number in (("lr", lr), ("eps", eps)):
        if not 0 <= number < inf:  # which NaN is not either
            raise ValueError(f"{name} is {number}: it must be finite and not negative")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}: accepted are 0 to 1, without 1")


def _check_beside(name: str, tensor: Tensor, parameter: Tensor, first: Tensor, half: bool) -> None:
    """Raise unless `tensor` lies as its parameter does: shape, strides, dense, and type and device of the first one."""
    accepted = HALVES if half else tuple({first.dtype} & {torch.float32, torch.float64}) or (torch.float32,)
    if tensor.dtype not in accepted:
        raise TypeError(f"{name} is {tensor.dtype}: expected {' or '.join(map(str, accepted))}")
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}, params[0] on {first.device}: expected one device")
    if not tensor.numel():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must not be empty")
    places = [
        [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
        for t in (tensor, parameter)
    ]
    if tensor.shape != parameter.shape or places[0] != places[1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: expected its parameter's, "
            f"{tuple(parameter.shape)} and {parameter.stride()}"
        )
    expected = 1
    for stride, size in sorted(places[0]):
        if stride != expected:
            raise ValueError(f"{name} has strides {tensor.stride()}: it must be dense, without gaps or overlap")
        expected *= size
