"""`gather_images`: the next batch of a dataset that lies on the device, shuffled, mirrored and scaled in one kernel."""

import torch
from torch import Tensor

from kernels.checks import check_gather
from kernels.dispatch import backend_of
from kernels.engine import LIBRARY, launchers
from kernels.geometry import nchw


def gather_images(
    rows: Tensor, permutation: Tensor, cursor: Tensor, batch: int, *, flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32, channels: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The next `batch` images of an epoch: image n is rows[permutation[k]]·2/255 − 1, k = (cursor + n) mod length.

    1. Each picture is read by the permutation, mirrored where flip[k] is not 0, scaled to [-1, 1] and rounded once.
    2. `cursor` grows by `batch`, on the device, so that a CUDA graph's next replay takes the next images.

    Args:
        rows: the dataset (rows, H, W, C) uint8, contiguous.
        permutation: the order (length,) int64, of row numbers. The fused kernels trust these: to check them would be to
            wait for the device.
        cursor: () int64 on rows' device: images taken so far; moved in place.
        batch: images, at least 1.
        flip: (length,) uint8, by place in the permutation: non-zero mirrors left to right. None: no mirroring.
        dtype: of the result: bfloat16, float16 or float32.
        channels: of the result; those past C are zeros. None: C.
        backend: one of `kernels.dispatch.BACKENDS`; None: that of `use_backend`, else `auto`.

    Returns:
        (batch, channels, H, W) in [-1, 1], channels_last.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: a backend asked for by name that cannot run.

    Source: docs/gather.md.
    """
    channels = check_gather(rows, permutation, cursor, batch, flip, dtype, channels)
    backend = backend_of("gather_images", None, rows.device, dtype, backend, batch)
    return torch.ops.dcgan_kernels.gather_images.default(
        rows, permutation, cursor, batch, flip, dtype, channels, backend
    )


def _gather(rows, permutation, cursor, batch, flip, dtype, channels, backend):
    return nchw(launchers(backend).gather(rows, permutation, cursor, batch, flip, dtype, channels))


def _fake(rows, permutation, cursor, batch, flip, dtype, channels, backend):
    _, height, width, _ = rows.shape
    return nchw(rows.new_empty((batch, height, width, channels), dtype=dtype))


LIBRARY.define(
    "gather_images(Tensor rows, Tensor permutation, Tensor(a!) cursor, SymInt batch, Tensor? flip, ScalarType dtype, "
    "SymInt channels, str backend) -> Tensor"
)
LIBRARY.impl("gather_images", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("dcgan_kernels::gather_images", _fake, lib=LIBRARY)
