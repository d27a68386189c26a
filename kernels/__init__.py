"""Fused kernels for strided convolutions, transposed convolutions, batch norm and their activations."""

from kernels.conv_act import conv_act, conv_transpose_act
from kernels.conv_bn_act import conv_bn_act, conv_transpose_bn_act
from kernels.dispatch import BACKENDS, BackendError, use_backend
from kernels.modules import FusedSequential, Fusion, fuse

__all__ = [
    "BACKENDS",
    "BackendError",
    "FusedSequential",
    "Fusion",
    "conv_act",
    "conv_bn_act",
    "conv_transpose_act",
    "conv_transpose_bn_act",
    "fuse",
    "use_backend",
]
