"""Fused kernels for a DCGAN: convolutions with batch norm and activation, the loss, Adam, the gather of a batch."""

from kernels.adam_step import adam_step, new_loss_scale
from kernels.conv_act import conv_act, conv_transpose_act
from kernels.conv_bn_act import conv_bn_act, conv_transpose_bn_act
from kernels.dispatch import BACKENDS, BackendError, use_backend
from kernels.gan_loss import GanLoss, gan_loss
from kernels.gather_images import gather_images
from kernels.modules import FusedSequential, Fusion, fuse

__all__ = [
    "BACKENDS",
    "BackendError",
    "FusedSequential",
    "Fusion",
    "GanLoss",
    "adam_step",
    "conv_act",
    "conv_bn_act",
    "conv_transpose_act",
    "conv_transpose_bn_act",
    "fuse",
    "gan_loss",
    "gather_images",
    "new_loss_scale",
    "use_backend",
]
