"""The extension's scalar kernels on a GPU: what a CPU cannot tell. Skipped without a GPU or without the extension."""

import pytest
import torch
from interpreter import assert_accurate

from kernels import _cuda, reference
from kernels._cuda import batch_norm, conv
from kernels._cuda.adam import adam, adam_table
from kernels._cuda.head import head, head_grad
from kernels.geometry import Partials

DEVICE, REPEATS = "cuda", 1000
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if _cuda.available():
    pytest.skip(_cuda.available(), allow_module_level=True)


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def both_passes(y, da, weight, bias, groups, launch=batch_norm):
    """What batch norm makes, forward and backward, by these launchers or their twins."""
    state = launch.merge_statistics(launch.statistics(y, groups), weight, bias)
    g, partials = launch.activation_grad(da, y, state, "leaky_relu")
    dweight, dbias, means = launch.merge_sums(partials, y.numel() // y.shape[3] // groups)
    return state, launch.apply(y, state, "leaky_relu"), g, launch.apply_grad(g, y, state, means), dweight, dbias


def batch_norm_arguments(shape, dtype=torch.float32):
    channels = shape[-1]
    return noise(*shape, dtype=dtype) + 1, noise(*shape, dtype=dtype, seed=1), noise(channels), noise(channels, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 32, 32, 128), (6, 9, 7, 40), (4, 5, 5, 7), (128, 4, 4, 512)], ids=str)
def test_batch_norm(shape, dtype):
    arguments = batch_norm_arguments(shape, dtype)
    made = both_passes(*arguments, 2)
    twins = both_passes(*arguments, 2, reference)
    exact = both_passes(*(t.double() for t in arguments), 2, reference)
    rows = shape[0] * shape[1] * shape[2]
    for name, ours, twin, oracle in zip(("state", "a", "g", "dy"), made, twins, exact, strict=False):
        assert_accurate(ours, twin, oracle, name)
    for ours, oracle in zip(made[4:], exact[4:], strict=True):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-4, atol=1e-4 * rows**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head(dtype):
    y, weight = noise(256, 4, 4, 512, dtype=dtype), noise(1, 4, 4, 512, dtype=dtype, seed=1) / 90
    state = reference.merge_statistics(reference.statistics(y, 2), noise(512), noise(512))
    real, names = (True, False), ("logits", "dlogits", "means")
    made, twins = head(y, weight, state, real), reference.head(y, weight, state, real)
    exact = reference.head(y.double(), weight.double(), state.double(), real)
    for name, ours, twin, oracle in zip(names, made, twins, exact, strict=True):
        assert_accurate(ours, twin, oracle, name, terms=8192)
    g, _, dw = head_grad(y, weight, state, made[1])
    twins = reference.head_grad(y, weight, state, made[1])
    exact = reference.head_grad(y.double(), weight.double(), state.double(), made[1].double())
    assert_accurate(g, twins[0], exact[0], "g")
    assert_accurate(dw, twins[2], exact[2], "dw", terms=256)


def adam_arguments(sizes=(300_001, 64, 7)):
    made = [[noise(n, seed=seed) for n in sizes] for seed in range(3)]
    second = [noise(n, seed=4).abs() for n in sizes]
    return *made, second, [torch.empty_like(p, dtype=torch.bfloat16) for p in made[0]]


def test_adam_in_a_graph_counts_its_steps():
    arguments, twins = adam_arguments(), adam_arguments()
    table, step = adam_table(*arguments), torch.zeros((), dtype=torch.int64, device=DEVICE)
    adam(table, step, 1e-3)  # warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adam(table, step, 1e-3)
    for _ in range(4):
        graph.replay()
    twin_step = torch.zeros_like(step)
    for _ in range(5):
        reference.adam(reference.adam_table(*twins), twin_step, 1e-3)
    assert step == 5 and not table.flags.any()
    for ours, theirs in zip(arguments[:4], twins[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(arguments[4], arguments[0], strict=True))


def test_a_graph_of_the_head_finds_its_ticket_at_zero():
    y, weight, state = noise(64, 4, 4, 32), noise(1, 4, 4, 32), noise(4, 2, 32)
    ticket = torch.zeros(1, dtype=torch.int32, device=y.device)
    expected = [t.clone() for t in head(y, weight, state, (True, False), ticket=ticket)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = head(y, weight, state, (True, False), ticket=ticket)
    for _ in range(REPEATS):
        graph.replay()
    assert ticket == 0 and all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_the_same_bits_every_time():
    arguments = batch_norm_arguments((32, 16, 16, 64), torch.bfloat16)
    y, weight, state = noise(256, 4, 4, 64), noise(1, 4, 4, 64), noise(4, 2, 64)

    def run():
        forward = head(y, weight, state, (True, False))
        g, partials, dw = head_grad(y, weight, state, forward[1])
        return *both_passes(*arguments, 2), *forward, g, partials.values, dw

    first = run()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_a_stream_of_the_callers():
    """Work on it waits for what is on it already: run elsewhere, the kernel would read zeros."""
    y, state = torch.zeros(64, 32, 32, 128, device=DEVICE), noise(4, 1, 128)
    expected = reference.apply(torch.ones_like(y), state, "relu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y.fill_(1)
        made = batch_norm.apply(y, state, "relu")
    stream.synchronize()
    torch.testing.assert_close(made, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one():
    y, state = noise(4, 4, 4, 16), noise(4, 1, 16)
    other = torch.device("cuda", 1)
    made = batch_norm.apply(y.to(other), state.to(other))
    assert made.device == other and torch.equal(made.cpu(), batch_norm.apply(y, state).cpu())
    for channels in (3, 64):  # as many blocks as that device's SMs take, and TMA's maps
        x, weight = (noise(*shape, channels, dtype=torch.bfloat16) for shape in ((2, 8, 8), (64, 4, 4)))
        made, _ = conv.conv(x.to(other), weight.to(other))
        assert made.device == other and torch.equal(made.cpu(), conv.conv(x, weight)[0].cpu())
    with pytest.raises(RuntimeError, match="got tensors on cuda:0 and cuda:1"):
        torch.ops.dcgan_cuda.bn_apply(y, state.to(other), torch.empty_like(y), 0, 64, 1, 16, 64, 1.0)


def test_a_strided_tensor_is_refused_by_the_op_itself():
    y, state = noise(4, 4, 4, 16), noise(4, 1, 16)
    with pytest.raises(RuntimeError, match="bn_apply got a tensor that is not contiguous"):
        torch.ops.dcgan_cuda.bn_apply(y[:, ::2], state, torch.empty_like(y), 0, 32, 1, 16, 64, 1.0)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of memory")
    y = torch.ones(3, 1, 2**25 + 8, 32, device=DEVICE, dtype=torch.bfloat16)
    y[-1, -1, -1] = 2
    state = noise(4, 1, 32)
    made = batch_norm.apply(y, state)
    for pixel in (y[:1, :, :2], y[-1:, :, -2:]):
        there = made[:1, :, :2] if pixel.data_ptr() == y.data_ptr() else made[-1:, :, -2:]
        torch.testing.assert_close(there, reference.apply(pixel.contiguous(), state))


def test_opcheck():
    y, state = noise(4, 4, 4, 16), noise(4, 2, 16)
    ops = torch.ops.dcgan_cuda
    torch.library.opcheck(ops.bn_apply, (y, state, torch.empty_like(y), 0, 32, 2, 16, 64, 0.2))
    values, counts = noise(2, 2, 1, 16), noise(2, 1)
    torch.library.opcheck(ops.bn_statistics, (y, values, counts, 0, 32, 2, 16, 64))
    outs = [noise(16), noise(16), noise(2, 2, 16)]
    torch.library.opcheck(ops.bn_merge_sums, (Partials(values, None).values, *outs, 32, 2, 1, 16))
