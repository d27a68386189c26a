"""`conv_act` and `conv_transpose_act`: a convolution of either kind and its activation, in one kernel."""

import torch.nn.functional as F
from torch import Tensor

from kernels import engine, reference
from kernels.checks import autocast, check_layer
from kernels.dispatch import backend_of


def conv_act(
    x: Tensor, weight: Tensor, *, stride: int = 2, padding: int = 1, activation: str = "leaky_relu",
    negative_slope: float = 0.2, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Convolution without bias, then an activation: `y = act(x ∗ weight)`.

    Args:
        x: (N, C, H, W) bfloat16, float16, float32 or float64, H = W; channels_last memory, other layouts are copied to
            it. Under autocast it is cast first.
        weight: (O, C, R, R), cast to x's type; best in channels_last memory. Its gradient has its own type.
        stride, padding: of both axes. For kernel 4, stride 2, padding 1 on an even size the backends have a
            convolution of their own; elsewhere they take the library's.
        activation: `none`, `relu`, `leaky_relu` or `tanh`.
        negative_slope: of leaky_relu, 0 to 1.
        backend: one of `kernels.dispatch.BACKENDS`; None: that of `use_backend`, else `auto`.

    Returns:
        (N, O, H', W') of x's type, channels_last.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: a backend asked for by name that cannot run.

    Source: Radford, Metz, Chintala 2015, section 3 (strided convolutions, LeakyReLU).
    """
    return _act("conv", x, weight, stride, padding, activation, negative_slope, backend)


def conv_transpose_act(
    x: Tensor, weight: Tensor, *, stride: int = 2, padding: int = 1, activation: str = "tanh",
    negative_slope: float = 0.2, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Transposed convolution without bias, then an activation: a generator's last layer.

    As `conv_act`, but weight is (C, O, R, R), as ConvTranspose2d's, and the result is (N, O, stride·(H − 1) + R −
    2·padding, …).
    """
    return _act("conv_transpose", x, weight, stride, padding, activation, negative_slope, backend)


def _act(kind, x, weight, stride, padding, activation, slope, backend):
    layer = check_layer(kind, x, weight, stride, padding, activation, slope, batch_norm=False)
    x = autocast(x)
    backend = backend_of(f"{kind}_act", layer, x.device, x.dtype, backend, x.shape[0])
    if backend == "eager":
        convolution = F.conv2d if kind == "conv" else F.conv_transpose2d
        y = convolution(x, weight.to(x.dtype), stride=stride, padding=padding)
        return reference.activate(y, activation, slope)
    return engine.Act.apply(x, weight, kind, (stride, padding, activation, slope), backend)
