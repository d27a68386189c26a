"""`adam_step`: one step of Adam over every tensor of a network in one kernel, which leaves 16-bit weights behind."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_adam, check_lists, check_tensors
from kernels.dispatch import backend_of
from kernels.engine import LIBRARY, launchers

TABLES = 8
"""How many tables of addresses are kept: a network's, for as long as its tensors stay where they are."""


def new_loss_scale(device: torch.device | str | None = None, first: float = 2.0**16) -> Tensor:
    """What `adam_step` needs for float16: (3,) float32, the scale, the steps since it moved, the overflows since then.

    Multiply the loss by its first element. It is a tensor like any other: save it with the optimiser's state.

    Raises:
        ValueError: `first` is not a positive number.
    """
    if not 0 < first < float("inf"):
        raise ValueError(f"first is {first}: it must be positive and finite")
    return torch.tensor([first, 0.0, 0.0], dtype=torch.float32, device=device)


def adam_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    step: Tensor, *, lr: float = 2e-4, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8,
    copies: Sequence[Tensor | None] | None = None, loss_scale: Tensor | None = None, move_scale: bool = True,
    backend: str | None = None,
) -> None:  # fmt: skip
    """One step of Adam, in place, as torch.optim.Adam takes it without weight decay and amsgrad; t = step + 1:

        m ← β1·m + (1 − β1)·g        v ← β2·v + (1 − β2)·g²        p ← p − lr/(1 − β1ᵗ) · m / (√v/√(1 − β2ᵗ) + ε)

    1. With `loss_scale`: where any gradient is infinite or NaN nothing but the scale moves; else g is divided by it.
    2. p, m and v of every tensor, and its copy ← p, rounded.
    3. `step`, and with `move_scale` the loss scale, as torch.amp.GradScaler moves it: halved after an overflow, doubled
       after 2000 steps without. All of it on the device, so that a CUDA graph may replay it.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: float32 (float64 by `eager`), on one device; one of each a parameter, of
            its shape and strides, dense: elements are paired as they lie in memory.
        step: () int64, or float32 as torch.optim.Adam keeps it, on that device: updates done so far.
        lr, betas, eps: the usual; a CUDA graph keeps those of its capture.
        copies: for each parameter None, or a bfloat16 or float16 tensor of its shape and strides: what mixed-precision
            matrix products read. None: no copies.
        loss_scale: of `kernels.new_loss_scale`: the factor that the gradients carry; the stored gradients keep it.
        move_scale: False for all but the last network of a step that share a scale.
        backend: one of `kernels.dispatch.BACKENDS`; None: that of `use_backend`, else `auto`.

    The fused kernels find the tensors through a table of addresses on the device, which is made at the first call with
    these tensors. In a CUDA graph that call must precede the capture: keep gradients where they are
    (`zero_grad(set_to_none=False)`).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name and index.
        BackendError: a backend asked for by name that cannot run.
        RuntimeError: tensors that moved, inside a capture.

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; docs/adam.md.
    """
    given = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_lists(**given, **({} if copies is None else {"copies": copies}))
    copies = [None] * len(params) if copies is None else list(copies)
    for name, tensors in given.items():
        check_tensors(**{f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)})
    lists = [[t.detach() for t in tensors] for tensors in given.values()]
    check_adam(*lists, copies, step, lr, betas, eps, loss_scale)
    sizes = sum(p.numel() for p in params)
    backend = backend_of("adam_step", None, step.device, params[0].dtype, backend, sizes)
    copied = [index for index, copy in enumerate(copies) if copy is not None]
    torch.ops.dcgan_kernels.adam_step.default(
        *lists, [copies[index] for index in copied], copied, step, loss_scale, lr, *betas, eps, move_scale, backend
    )
    if not torch.compiler.is_compiling():  # a graph that saved one of them must notice
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, step])


def _adam_step(
    params, grads, exp_avgs, exp_avg_sqs, copies, copied, step, loss_scale, lr, beta1, beta2, eps, move_scale, backend
):  # fmt: skip
    every = [None] * len(params)
    for index, copy in zip(copied, copies, strict=True):
        every[index] = copy
    lists = (params, grads, exp_avgs, exp_avg_sqs, every)
    if backend == "eager" and loss_scale is None:
        steps = [(step + 1).float()] * len(params)
        torch._fused_adam_(
            *lists[:4], [], steps, amsgrad=False, lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps,
            maximize=False,
        )  # fmt: skip
        step += 1
        for index, copy in zip(copied, copies, strict=True):
            copy.copy_(params[index])
    elif backend == "eager":
        reference.adam(reference.adam_table(*lists), step, lr, (beta1, beta2), eps, loss_scale, move_scale)
    else:
        launchers(backend).adam(_table(lists, backend), step, lr, (beta1, beta2), eps, loss_scale, move_scale)


_tables: OrderedDict[tuple, Any] = OrderedDict()  # by all that a table is made of
_captured: dict[tuple, Any] = {}  # those that a CUDA graph reads whenever it is replayed: kept for good


def _table(lists: Sequence[Sequence[Tensor | None]], backend: str) -> Any:
    """The table of addresses of these tensors, which the caller keeps alive."""
    key = (backend, *(
        None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for ts in lists for t in ts
    ))  # fmt: skip
    capturing = lists[0][0].is_cuda and torch.cuda.is_current_stream_capturing()
    if key not in _tables:
        if capturing:
            raise RuntimeError(
                "adam_step met new tensors inside a CUDA graph's capture, where their addresses cannot be sent to the "
                "device: call it once before with these very parameters and gradients (zero_grad(set_to_none=False))"
            )
        _tables[key] = replace(launchers(backend).adam_table(*lists), tensors=())
        while len(_tables) > TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if capturing:
        _captured[key] = _tables[key]
    return _tables[key]


LIBRARY.define(
    "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] copies, int[] copied, Tensor(e!) step, Tensor(f!)? loss_scale, float lr, float beta1, float beta2, "
    "float eps, bool move_scale, str backend) -> ()"
)
LIBRARY.impl("adam_step", _adam_step, "CompositeExplicitAutograd")
torch.library.register_fake("dcgan_kernels::adam_step", lambda *args: None, lib=LIBRARY)
