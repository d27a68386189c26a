"""Small calls of every kernel, for compute-sanitizer to watch, and bugs planted for it to find.

A case is called with the launchers of a backend and a device. Shapes are small, since the tools slow a kernel down a
hundredfold, and awkward, since that is where a stray access would be: odd batches, sizes that no tile divides.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels.geometry import Deferred, Epilogue, Merge, MergeGradients, Shares

GROUPS = 2
Noise = Callable[..., Tensor]


def noise_on(device: torch.device) -> Noise:
    """Tensors of noise, made on the host, so that a tool sees no kernels but the case's own."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return noise


def state_of(noise: Noise, channels: int) -> Tensor:
    """A batch-norm state: mean, rstd (positive), scale, shift."""
    state = noise(4, GROUPS, channels, dtype=torch.float32).cpu()
    state[1] = state[1].abs() + 0.5
    return state.to(noise(1).device)


def epilogues(noise: Noise, shape: tuple[int, ...], dtype: torch.dtype) -> list[Epilogue]:
    """One of each mode, for an output of `shape`; those with sums also with the batch norm settled."""
    saved, state = noise(*shape, dtype=dtype), state_of(noise, shape[3])
    weight, bias, mean, var = (noise(shape[3], dtype=torch.float32) for _ in range(4))
    norm = Merge(weight, bias, mean, var, torch.zeros((), dtype=torch.int64).to(saved.device))
    return [
        Epilogue("leaky_relu", groups=GROUPS),
        Epilogue("relu", groups=GROUPS, state=state),
        Epilogue(statistics=True, groups=GROUPS),
        Epilogue("leaky_relu", groups=GROUPS, saved=saved),
        Epilogue("relu", groups=GROUPS, saved=saved, state=state),
        Epilogue(statistics=True, groups=GROUPS, merge=norm),
        Epilogue("relu", groups=GROUPS, saved=saved, state=state, merge=MergeGradients(weight, bias)),
    ]


def products(run: SimpleNamespace, noise: Noise, low: int, high: int, size: int, dtype: torch.dtype) -> None:
    """The three products of a layer, with every epilogue that the launchers have for it."""
    images = 3 * GROUPS
    small, large = noise(images, size, size, low, dtype=dtype), noise(images, 2 * size, 2 * size, high, dtype=dtype)
    weight = noise(low, 4, 4, high, dtype=dtype)
    missing = getattr(run, "missing", lambda *arguments: None)
    for name, x, shape in (("conv", large, small.shape), ("conv_transpose", small, large.shape)):
        for epilogue in epilogues(noise, tuple(shape), dtype):
            if not missing(name, x, weight, epilogue):
                getattr(run, name)(x, weight, epilogue)
    if not missing("wgrad", small, large):
        run.wgrad(small, large)


def gemms(run: SimpleNamespace, noise: Noise) -> None:
    """Products of the middle layers: on TMA boxes where there are any, and by pointers."""
    products(run, noise, 64, 64, 6, torch.bfloat16)
    products(run, noise, 128, 64, 4, torch.float16)
    products(run, noise, 20, 36, 5, torch.bfloat16)  # rows of no multiple of 16 bytes: masked pointer loads
    products(run, noise, 24, 16, 4, torch.float32)


def images(run: SimpleNamespace, noise: Noise) -> None:
    """Products of the RGB ends."""
    for channels in (1, 3, 4):
        products(run, noise, 24, channels, 7, torch.bfloat16)
        products(run, noise, 72, channels, 9, torch.float32)
    products(run, noise, 64, 3, 34, torch.float16)  # two boxes across


def prologues(run: SimpleNamespace, noise: Noise) -> None:
    """Products that apply their input's batch norm as they load it: on TMA boxes, by pointers, to and from images; the
    shares of weight gradients added up together."""
    for low, high, size, dtype in ((64, 64, 4, torch.bfloat16), (20, 24, 3, torch.float16), (24, 3, 5, torch.float32)):
        small, large = (noise(3 * GROUPS, n, n, c, dtype=dtype) for n, c in ((size, low), (2 * size, high)))
        weight, merged = noise(low, 4, 4, high, dtype=dtype), Epilogue(statistics=True, groups=GROUPS)
        above = Deferred(large, state_of(noise, high), "leaky_relu")
        below = Deferred(small, state_of(noise, low), "relu")
        run.conv(above, weight, merged)
        run.conv_transpose(below, weight, Epilogue("tanh", groups=GROUPS) if high <= 4 else merged)
        pending: list[Shares] = []
        run.wgrad(below, large, pending=pending)
        run.wgrad(small, above, pending=pending)
        run.sum_shares(pending)


def batch_norm(run: SimpleNamespace, noise: Noise) -> None:
    """Statistics, merges and applies, forward and backward."""
    for channels, dtype in ((64, torch.bfloat16), (24, torch.float32), (7, torch.float16)):
        y, da = (noise(3 * GROUPS, 5, 5, channels, dtype=dtype) for _ in range(2))
        weight, bias, mean, var = (noise(channels, dtype=torch.float32) for _ in range(4))
        tracked = torch.zeros((), dtype=torch.int64).to(y.device)
        state = run.merge_statistics(run.statistics(y, GROUPS), weight, bias, mean, var, tracked)
        run.apply(y, state, "leaky_relu")
        g, partials = run.activation_grad(da, y, state, "relu")
        _, _, means = run.merge_sums(partials, 3 * 25)
        run.apply_grad(g, y, state, means)


def head(run: SimpleNamespace, noise: Noise) -> None:
    """D's last layer with its loss and gradients, and the loss by itself."""
    for channels, dtype in ((64, torch.bfloat16), (24, torch.float32)):
        y, weight = noise(5 * GROUPS, 4, 4, channels, dtype=dtype), noise(1, 4, 4, channels, dtype=dtype)
        state = state_of(noise, channels)
        _, dlogits, _ = run.head(y, weight, state, (True, False))
        run.head_grad(y, weight, state, dlogits)
        run.head_grad(y, weight, state, dlogits, weight_grad=False)
    run.gan_loss(noise(7 * GROUPS, dtype=torch.float32), (True, False))


def adam(run: SimpleNamespace, noise: Noise) -> None:
    """Tensors of unlike sizes in one launch, with and without copies and a loss scale."""
    shapes = ((5, 4, 4, 3), (2049,), (1,))
    for copy, scaled in ((torch.bfloat16, False), (torch.float16, True), (None, False)):
        lists = [[noise(*shape, dtype=torch.float32) for shape in shapes] for _ in range(3)]
        squares = [noise(*shape, dtype=torch.float32).square_() for shape in shapes]
        copies = [noise(*shape, dtype=copy) if copy else None for shape in shapes]
        step = torch.zeros((), dtype=torch.int64).to(squares[0].device)
        scale = torch.tensor([1024.0, 0.0, 0.0]).to(step.device) if scaled else None
        run.adam(run.adam_table(*lists, squares, copies), step, 2e-4, loss_scale=scale)


def gather(run: SimpleNamespace, noise: Noise) -> None:
    """Images by a permutation, mirrored and not, with a channel of padding and without."""
    device = noise(1).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (37, 14, 14, 3), generator=generator, dtype=torch.uint8).to(device)
    permutation = torch.randperm(37, generator=generator).to(device)
    flip = torch.randint(0, 2, (37,), generator=generator, dtype=torch.uint8).to(device)
    cursor = torch.tensor(33).to(device)  # the batch goes past the end
    run.gather(rows, permutation, cursor, 5, flip)
    run.gather(rows, permutation, cursor, 5, channels=4)


CASES: dict[str, Callable[[SimpleNamespace, Noise], None]] = {
    "gemms": gemms, "images": images, "prologues": prologues, "batch_norm": batch_norm, "head": head, "adam": adam,
    "gather": gather,
}  # fmt: skip
TRITON_ALONE = ("prologues", "gather")
"""What the extension has no kernel for."""


def planted(tool: str, device: torch.device) -> None:
    """A bug that `tool` must find: a write past a tensor, a read of memory nobody wrote, a race in shared memory."""
    from bench.sanitizer.bugs import race, write_past

    x = torch.empty(96).to(device)
    if tool == "memcheck":
        write_past[(1,)](x, 96, BLOCK=128)
    elif tool == "initcheck":
        never_written = torch.empty(128, device=device)
        write_past[(1,)](torch.empty(256).to(device), 128, BLOCK=128, SOURCE=never_written)
    else:
        race[(1,)](torch.empty(128, dtype=torch.int32).to(device), BLOCK=128)


def launchers(backend: str) -> SimpleNamespace:
    """The launchers of `triton`; or those of `cuda` that the extension has itself."""
    if backend == "triton":
        from kernels.launchers import launchers as by_name

        return by_name("triton")
    from kernels._cuda import adam as adam_
    from kernels._cuda import batch_norm as bn
    from kernels._cuda import conv
    from kernels._cuda import head as head_

    modules = (adam_, bn, conv, head_)
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def run(backend: str, case: str, device: torch.device) -> None:
    """One case in this process, to its end."""
    CASES[case](launchers(backend), noise_on(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
