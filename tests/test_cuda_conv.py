"""The extension's tensor-core convolutions, run on a CPU with barriers, TMA and wgmma modelled, against their twins.

What this shows is arithmetic: which box each tap loads, where the swizzle puts it, which operand a descriptor names,
which pixel and channel an accumulator is of, and the counting of the pipeline's barriers. Whether a GPU's asynchronous
units agree with the model only a GPU can tell.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_host import in_every_order, on_host
from cuda_products import MODES, check_product
from epilogues import epilogue_of
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, generated, tensor

from kernels import reference
from kernels._cuda import conv as products
from kernels.arguments import tickets
from kernels.geometry import CUDA_CLUSTERS, CUDA_COLUMNS, CudaConfig, Epilogue, Merge, MergeGradients

OURS = {"conv": products.conv, "conv_transpose": products.conv_transpose}
SERVED = [(mode, activation) for mode, activation in MODES if activation != "tanh"]
BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def host():
    with on_host():
        yield


@pytest.fixture(params=["sm90", "sm80"])
def source(request, monkeypatch):
    """Which kernels run, as the GPU would decide."""
    monkeypatch.setattr(products, "source", lambda tensor: request.param)
    return request.param


def check(kind, *shape, config=None, dtype=BF16, **epilogue):
    check_product(OURS[kind], kind, dtype, *shape, config=config and CudaConfig(*config), **epilogue)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "images, groups, height, width, into, out, config",
    [
        pytest.param(2, 1, 8, 8, 64, 64, (64,), id="one whole tile"),
        pytest.param(1, 2, 4, 8, 64, 128, (128, 2), id="two groups in tiles cut short, a cluster of both"),
        pytest.param(2, 1, 4, 6, 128, 192, (128,), id="two chunks, columns that hang over, a width of 6"),
        pytest.param(1, 1, 5, 17, 64, 64, (64, 2), id="two boxes across, a cluster"),
        pytest.param(1, 2, 16, 16, 192, 64, (64, 4), id="three chunks, a cluster of four"),
        pytest.param(3, 1, 4, 4, 64, 128, (128, 4), id="a cluster that does not divide the boxes"),
    ],
)
def test_shapes(kind, images, groups, height, width, into, out, config, source):
    check(kind, images, groups, height, width, into, out, config=config, mode="statistics")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("mode, activation", SERVED)
def test_epilogues(kind, mode, activation, source):
    check(kind, 2, 2, 4, 6, 64, 128, mode=mode, activation=activation)


def test_the_last_blocks_settle_the_batch_norm(source):
    """As launches of their own do: over two groups, over two rounds of tiles, and twice: the tickets are put back."""
    generator = torch.Generator().manual_seed(0)
    shape, options = (18, 16, 16, 64), {"config": CudaConfig(64, 2)}
    x, weight = tensor(generator, 18, 8, 8, 64, dtype=BF16), tensor(generator, 64, 4, 4, 64, dtype=BF16) / 32
    gamma, beta = (tensor(generator, 64) for _ in range(2))

    def state_of(launch):
        mean, var, tracked = torch.zeros(64), torch.ones(64), torch.tensor(5)
        epilogue = Epilogue(statistics=True, groups=2)
        return *launch(epilogue, Merge(gamma, beta, mean, var, tracked, 1e-3, 0.25)), mean, var, tracked.float()

    def gradients_of(launch):
        dweight, dbias = torch.empty(64), torch.empty(64)
        epilogue = epilogue_of(torch.Generator().manual_seed(1), "batch_norm_grad", "relu", 2, shape, BF16)
        return *launch(epilogue, MergeGradients(dweight, dbias)), dweight, dbias

    def together(epilogue, merge):
        return products.conv_transpose(x, weight, replace(epilogue, merge=merge), **options)

    def apart(epilogue, merge):
        y, partials = products.conv_transpose(x, weight, epilogue, **options)
        assert partials.values.shape[2] == 20
        if epilogue.statistics:
            return y, reference.merge_statistics(partials, *merge)
        return y, reference.merge_sums(partials, 9 * 256, merge[:2])[2]

    for made in (state_of, gradients_of):
        expected = made(apart)
        for _ in range(2):
            for ours, theirs in zip(made(together), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    one = epilogue_of(torch.Generator().manual_seed(1), "batch_norm_grad", "relu", 1, shape, BF16)
    _, means = together(one, MergeGradients())  # 36 tiles: two rounds
    _, partials = products.conv_transpose(x, weight, one, **options)
    torch.testing.assert_close(means, reference.merge_sums(partials, 18 * 256)[2], rtol=2e-5, atol=2e-5)
    assert not tickets(x, 1).any()


@pytest.mark.parametrize(
    "merge, groups, message",
    [
        (Merge(torch.zeros(63), torch.zeros(64)), 1, r"merge.weight has shape \(63,\)"),
        (Merge(torch.zeros(64), torch.zeros(64), tracked=torch.zeros(())), 1, "merge.tracked is torch.float32"),
        (Merge(torch.zeros(64), torch.zeros(64)), 2, "at least 2"),
    ],
)
def test_a_batch_norm_that_does_not_fit(merge, groups, message):
    x, weight = torch.zeros(2, 2, 2, 64, dtype=BF16), torch.zeros(64, 4, 4, 64, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        products.conv(x, weight, Epilogue(statistics=True, groups=groups, merge=merge))


def test_half_precision(source):
    check("conv_transpose", 1, 1, 2, 2, 64, 64, dtype=torch.float16, mode="batch_norm_grad", activation="relu")


def test_a_mean_far_from_zero_costs_no_variance():
    check("conv_transpose", 2, 1, 8, 8, 64, 64, mode="statistics", mean=4.0)


def check_wgrad(images, height, width, low, high, config=None, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = tensor(generator, images, height, width, low, dtype=dtype)
    large = tensor(generator, images, 2 * height, 2 * width, high, dtype=dtype)
    ours, pending = products.wgrad(small, large, config=config and CudaConfig(*config)), []
    oracle = reference.wgrad(small.double(), large.double())
    assert_accurate(ours, reference.wgrad(small, large), oracle, "wgrad", terms=images * height * width)
    later = products.wgrad(small, large, config=config and CudaConfig(*config), pending=pending)
    for shares, gradient in pending:
        assert gradient is later
        gradient.copy_(shares.sum(0))
    assert_accurate(later, ours, oracle, "wgrad, added up later", terms=images * height * width)
    return ours, len(pending)


@pytest.mark.parametrize(
    "images, height, width, low, high, config, shares",
    [
        pytest.param(4, 4, 4, 64, 64, None, False, id="one box: nothing to add up"),
        pytest.param(18, 8, 8, 128, 64, (128, 4), True, id="shares of two boxes"),
        pytest.param(5, 4, 6, 192, 128, (128, 2), False, id="columns that hang over, two clusters, a width of 6"),
        pytest.param(9, 5, 17, 64, 64, (64, 1), True, id="boxes cut on both sides, no cluster"),
        pytest.param(20, 2, 2, 128, 64, (64, 4), False, id="boxes of sixteen images"),
        pytest.param(70, 1, 1, 64, 64, None, False, id="one pixel"),
    ],
)
def test_weight_gradients(images, height, width, low, high, config, shares):
    assert check_wgrad(images, height, width, low, high, config)[1] == shares


def test_a_weight_gradient_in_half_precision_and_of_any_cluster():
    of = [check_wgrad(8, 8, 8, 64, 128, (64, cluster), torch.float16)[0] for cluster in (1, 2, 4)]
    assert torch.equal(of[0], of[1]) and torch.equal(of[0], of[2])


@pytest.mark.long
def test_generated_weight_gradients():
    @given(
        st.integers(1, 40), st.integers(1, 10), st.integers(1, 18), st.integers(1, 4), st.integers(1, 2),
        st.tuples(st.sampled_from(CUDA_COLUMNS), st.sampled_from(CUDA_CLUSTERS)), st.integers(0, 2**31),
    )  # fmt: skip
    def one(images, height, width, low, high, config, seed):
        check_wgrad(images, height, width, 64 * low, 64 * high, config, seed=seed)

    generated(one, 300)


@pytest.mark.long
def test_generated(source):
    @given(
        st.sampled_from(sorted(OURS)), st.integers(1, 3), st.integers(1, 2), st.integers(1, 6), st.integers(1, 18),
        st.integers(1, 2), st.integers(1, 3), st.sampled_from(SERVED),
        st.tuples(st.sampled_from(CUDA_COLUMNS), st.sampled_from(CUDA_CLUSTERS)), st.integers(0, 2**31),
    )  # fmt: skip
    def one(kind, images, groups, height, width, into, out, epilogue, config, seed):
        mode, activation = epilogue
        ends = 64 * into, 64 * out
        check(kind, images, groups, height, width, *ends, config=config, mode=mode, activation=activation, seed=seed)

    generated(one, 300)  # a tile takes a third of a second


def test_defaults_keep_every_sm_busy():
    assert products.default_config(512, 1, 256) == CudaConfig(128, 2)  # D3 at 256 images
    assert products.default_config(16, 1, 512) == CudaConfig(64, 4)  # D4 at 128: half as many tiles as SMs, were it 128
    assert products.default_config(10_000, 4, 64) == CudaConfig(64, 4)
    assert products.boxes(128, 16, 16) == 256 and products.box(4, 4) == (4, 4) and products.box(3, 40) == (4, 16)
    assert [products.cluster_of(tiles, 4) for tiles in (8, 6, 5)] == [4, 2, 1]


@pytest.mark.parametrize(
    "kernel, first, second, epilogue, dtype, reason",
    [
        ("conv", (1, 8, 8, 64), (96, 4, 4, 64), None, BF16, "multiples of 64"),
        ("conv", (1, 8, 8, 64), (64, 4, 4, 64), None, torch.float32, "take bfloat16 and float16"),
        ("conv_transpose", (1, 4, 4, 64), (64, 4, 4, 64), Epilogue("tanh"), BF16, "an epilogue with tanh"),
        ("wgrad", (1, 4, 4, 64), (1, 8, 8, 96), None, BF16, "multiples of 64"),
        ("conv", (1, 8, 8, 2), (64, 4, 4, 2), None, BF16, "2 image channels"),
    ],
)
def test_what_is_missing_is_named_and_refused(kernel, first, second, epilogue, dtype, reason):
    tensors = torch.zeros(first, dtype=dtype), torch.zeros(second, dtype=dtype)
    assert reason in products.missing(kernel, *tensors, epilogue)
    arguments = () if kernel == "wgrad" else (epilogue,)
    with pytest.raises(ValueError, match=f"{kernel} of .* by the extension: .*{reason}"):
        getattr(products, kernel)(*tensors, *arguments)


@pytest.mark.parametrize(
    "capability, expected", [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm80")]
)
def test_each_gpu_has_its_source(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert products.source(SimpleNamespace(device=torch.device("cuda"))) == expected
    assert products.source(torch.empty(0)) == "sm90"


def test_older_gpus_have_no_weight_gradient_between_maps(monkeypatch):
    monkeypatch.setattr(products, "source", lambda tensor: "sm80")
    with pytest.raises(ValueError, match=r"is for compute capability 9\.0"):
        products.wgrad(torch.zeros(1, 4, 4, 64, dtype=BF16), torch.zeros(1, 8, 8, 64, dtype=BF16))


def test_threads_do_not_race(source):
    """Turned around, or with copies and products as late as can be, the same bits; so, too, by other clusters."""
    generator = torch.Generator().manual_seed(0)
    x, weight = tensor(generator, 2, 8, 8, 64, dtype=BF16), tensor(generator, 64, 4, 4, 64, dtype=BF16)

    def run(cluster=2):
        found = []
        for kind, kernel in OURS.items():
            shape = (2, 4, 4, 64) if kind == "conv" else (2, 16, 16, 64)
            for mode in ("statistics", "batch_norm_grad"):
                epilogue = epilogue_of(torch.Generator().manual_seed(1), mode, "none", 2, shape, BF16)
                y, partials = kernel(x, weight, epilogue, config=CudaConfig(64, cluster))
                found += [y, *(t for t in partials if t is not None)]
        if products.source(x) == "sm90":
            found.append(products.wgrad(x, tensor(generator.manual_seed(2), 2, 16, 16, 64, dtype=BF16)))
        return found

    first, *others = in_every_order(run)
    for other in (*others, run(1)):
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("config, message", [((96,), "columns is 96: accepted are"), ((64, 3), "cluster is 3")])
def test_a_tile_that_there_is_not(config, message):
    with pytest.raises(ValueError, match=message):
        CudaConfig(*config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "bf16"}, "precision is 'bf16'"),
        ({"epilogue": Epilogue(statistics=True, groups=2)}, "groups is 2"),
    ],
)
def test_refused(options, message):
    x, weight = torch.zeros(1, 8, 8, 64, dtype=BF16), torch.zeros(64, 4, 4, 64, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        products.conv(x, weight, **options)


def test_images_go_to_their_own_kernels():
    generator = torch.Generator().manual_seed(0)
    x, weight = tensor(generator, 1, 8, 8, 3), tensor(generator, 8, 4, 4, 3)
    low = tensor(generator, 1, 4, 4, 8)
    assert_accurate(
        products.conv(x, weight)[0], reference.conv(x, weight)[0], reference.conv(x.double(), weight.double())[0]
    )
    up, oracle = reference.conv_transpose(low, weight)[0], reference.conv_transpose(low.double(), weight.double())[0]
    assert_accurate(products.conv_transpose(low, weight)[0], up, oracle)
    assert_accurate(products.wgrad(low, x), reference.wgrad(low, x), reference.wgrad(low.double(), x.double()))


@pytest.mark.parametrize("channels", [3, 64])
def test_outputs_go_where_they_are_wanted(channels):
    x, weight = torch.ones(1, 2, 2, 64, dtype=BF16), torch.ones(64, 4, 4, channels, dtype=BF16)
    out = torch.empty(1, 4, 4, channels, dtype=BF16)
    y, _ = products.conv_transpose(x, weight, out=out)
    assert y is out and torch.equal(y, reference.conv_transpose(x, weight)[0])
    with pytest.raises(ValueError, match="out has shape"):
        products.conv_transpose(x, weight, out=out[:, :2].contiguous())
    if channels == 3:
        gradient = torch.empty(64, 4, 4, 3)
        assert products.wgrad(x, torch.ones(1, 4, 4, 3, dtype=BF16), out=gradient) is gradient
        assert gradient[0, 1, 1, 0] == 4  # each of four pixels
