"""The launchers of each backend: the same names and arguments, tuned products, the library's, the extension's."""

import functools
import importlib
import inspect
import json
from dataclasses import asdict, replace

import pytest
import torch

from kernels import launchers, reference, tuning
from kernels._triton.config import ConvConfig, WgradConfig
from kernels.geometry import CudaConfig, Epilogue, Merge, MergeGradients
from kernels.library import Products

pytest.importorskip("triton")

NAME = "NVIDIA Test 1"
CONV = ConvConfig(2, 8, 8, 64, 32, 4, 3, True)
WGRAD = WgradConfig(2, 4, 4, 64, 64, 6, 4, 3, False)
TABLE = {
    "device": NAME,
    "tiles": {
        "conv": {
            "64x128@32": {
                "bf16": {
                    "128": {"recipe": "triton", "tile": asdict(CONV), "us": 12.3},
                    "1024": {"recipe": "library", "us": 40.0},
                    "8192": {"recipe": "cuda", "us": 300.0},
                    "65536": {"recipe": "cuda", "tile": {"columns": 64, "cluster": 4}, "us": 2400.0},
                }
            }
        },
        "wgrad": {"128x64@16": {"bf16": {"128": {"recipe": "triton", "tile": asdict(WGRAD)}}}},
    },
}


def names(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", vars(launchers._triton()))
def test_every_backend_takes_the_same_arguments(name):
    """So that a pass is written once. The twins alone have neither precision nor tile, and are not told the rows; the
    extension may lack some, and leaves the calls that have them to Triton, but for Adam."""
    triton = names(getattr(launchers._triton(), name))
    twin = names(getattr(reference, name))
    assert twin in (triton, [argument for argument in triton if argument not in ("precision", "config", "rows")])
    if name in launchers.GEMMS:
        library = names(getattr(Products(reference), name))
        assert library == [argument for argument in triton if argument != "config"]
    modules = [importlib.import_module(f"kernels._cuda.{family}") for family in ("conv", "batch_norm", "head", "adam")]
    for extension in (names(getattr(module, name)) for module in modules if hasattr(module, name)):
        assert extension == [argument for argument in triton if argument in extension]
        assert "adam" not in name or extension == triton


# Tuned products


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The products of Triton and the library, replaced by what they were called with; CPU tensors pass for a GPU's."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "nvidia-test-1.json").write_text(json.dumps(TABLE))
    tuning.forget()
    calls = []

    def record(recipe, kernel):
        def run(first, second, epilogue=None, precision="ieee", config=None):
            calls.append((recipe, kernel, config))

        return run

    triton = launchers._triton()
    for kernel in launchers.GEMMS:
        setattr(triton, kernel, record("triton", kernel))
        monkeypatch.setattr(Products, kernel, staticmethod(record("library", kernel)))
    monkeypatch.setattr(launchers, "_triton", lambda: triton)
    monkeypatch.setattr(launchers, "_cuda_missing", lambda: "not built")
    monkeypatch.setattr(tuning, "device_name", functools.cache(lambda device: NAME))
    launchers.launchers.cache_clear()
    yield calls
    launchers.launchers.cache_clear()
    tuning.load.cache_clear()
    tuning.tile.cache_clear()


def products(launch, images, size=32, **options):
    high = torch.empty(images, size, size, 64, dtype=torch.bfloat16)
    low = torch.empty(images, size // 2, size // 2, 128, dtype=torch.bfloat16)
    launch.conv(high, torch.empty(128, 4, 4, 64), **options)
    launch.wgrad(low, high)


def test_triton_takes_the_tile_that_was_measured_nearest(recorded):
    launch = launchers.launchers("triton")
    products(launch, 150)
    assert recorded == [("triton", "conv", CONV), ("triton", "wgrad", WGRAD)]
    recorded.clear()
    products(launch, 1024)  # measured there: the library, which is not Triton
    assert recorded == [("triton", "conv", None), ("triton", "wgrad", None)]


def test_auto_takes_the_recipe_that_was_measured_nearest(recorded):
    products(launchers.launchers("auto"), 1024)
    assert recorded == [("library", "conv", None), ("triton", "wgrad", None)]


def test_a_tile_given_by_hand_goes_first(recorded):
    mine = ConvConfig(1, 8, 8, 16, 16, 4, 2, False)
    products(launchers.launchers("auto"), 128, config=mine)
    assert recorded[0] == ("triton", "conv", mine)


def test_auto_takes_the_extension_only_where_it_is_built(recorded, monkeypatch):
    products(launchers.launchers("auto"), 8192)
    assert recorded[0] == ("triton", "conv", None)
    recorded.clear()
    monkeypatch.setattr(launchers, "_cuda_missing", lambda: None)
    extension = {"conv": lambda *_, **options: recorded.append(("cuda", "conv", options.get("config")))}
    monkeypatch.setattr(launchers, "_cuda", lambda triton: extension)
    launchers.launchers.cache_clear()
    products(launchers.launchers("auto"), 8192)
    assert recorded[0] == ("cuda", "conv", None)
    recorded.clear()
    products(launchers.launchers("auto"), 40_000)
    assert recorded[0] == ("cuda", "conv", CudaConfig(64, 4))


def test_the_extension_takes_its_own_tile_and_no_other(recorded, monkeypatch):
    extension = {
        name: lambda *_, name=name, **options: recorded.append(("cuda", name, options.get("config")))
        for name in launchers.GEMMS
    }
    monkeypatch.setattr(launchers, "_cuda", lambda triton: extension)
    for images, tile in ((40_000, CudaConfig(64, 4)), (8192, None), (128, None)):
        products(launchers.launchers("cuda"), images)
        assert recorded == [("cuda", "conv", tile), ("cuda", "wgrad", None)], "of Triton's tile at 128 nothing is taken"
        recorded.clear()


def test_on_a_cpu_no_table_is_looked_for(monkeypatch):
    monkeypatch.setattr(tuning, "load", lambda name: pytest.fail("looked for a table"))
    assert launchers._entry("conv", torch.empty(1, 4, 4, 8), torch.empty(8, 4, 4, 8), {}) is None


# The extension's, with Triton's behind them


def test_what_the_extension_leaves_goes_to_triton():
    calls = []

    def missing(first, second, epilogue):
        calls.append((first, second, epilogue))
        return "too odd" if epilogue is None else None

    def ours(x, weight, epilogue=None, precision="ieee"):
        return "ours", x, weight, epilogue, precision

    def theirs(x, weight, epilogue=None, precision="ieee", out=None):
        return "theirs", x, weight, epilogue, precision, out

    run = launchers._where_served(ours, theirs, missing)
    epilogue = Epilogue()
    assert run(1, 2) == ("theirs", 1, 2, None, "ieee", None)
    assert run(1, 2, epilogue) == run(1, weight=2, epilogue=epilogue) == ("ours", 1, 2, epilogue, "ieee")
    assert run(1, 2, epilogue, "tf32", None) == ("ours", 1, 2, epilogue, "tf32")
    assert run(1, 2, epilogue, out=3) == ("theirs", 1, 2, epilogue, "ieee", 3), "ours has no `out`"
    assert calls == [(1, 2, None), *[(1, 2, epilogue)] * 3]
    assert run(1, 2, config=CudaConfig(64))[0] == "theirs", "its tile is not handed on"
    assert launchers._where_served(ours, theirs)(1, 2)[0] == "ours"


def test_adam_and_its_table_are_of_one_backend():
    """Their blocks differ: one's launcher must never read the other's table."""
    from kernels._cuda import adam

    found = launchers._cuda(launchers._triton())
    assert found["adam"] is adam.adam and found["adam_table"] is adam.adam_table


# The library's products


@pytest.mark.parametrize("activation", ["none", "leaky_relu", "tanh"])
@pytest.mark.parametrize("kernel", ["conv", "conv_transpose"])
def test_the_library_s_products_are_the_reference_s(kernel, activation):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 6, 5, generator=g, dtype=torch.float64)
    shape = (7, 4, 4, 5) if kernel == "conv" else (5, 4, 4, 7)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    y = getattr(reference, kernel)(x, weight)[0]
    saved = torch.randn(y.shape, generator=g, dtype=torch.float64)
    state = torch.rand(4, 2, 7, generator=g, dtype=torch.float64)
    epilogues = [Epilogue(activation), Epilogue(activation, saved=saved), Epilogue(statistics=True, groups=2)]
    if activation != "tanh":
        epilogues.append(Epilogue(activation, groups=2, saved=saved, state=state))
    for epilogue in epilogues:
        for merged in (False, True):
            results = []
            for run in (Products(reference), reference):  # each moves vectors of its own
                vectors = [torch.ones(7, dtype=torch.float64) for _ in range(4)]
                kind = MergeGradients if epilogue.mode == "batch_norm_grad" else Merge
                merge = kind(*vectors[: len(kind._fields)][:4]) if merged else None
                finished, partials = getattr(run, kernel)(x, weight, replace(epilogue, merge=merge))
                results.append((finished, partials, vectors))
            torch.testing.assert_close(*results)
            with_sums = merged and results[0][1] is not None
            assert any((vector != 1).any() for vector in results[0][2]) == with_sums
    if kernel == "conv_transpose":
        out = torch.empty_like(y)
        assert Products(reference).conv_transpose(x, weight, out=out)[0] is out
        torch.testing.assert_close(out, y)


def test_the_library_s_weight_gradient_is_the_reference_s():
    g = torch.Generator().manual_seed(0)
    low, high = torch.randn(3, 4, 4, 6, generator=g), torch.randn(3, 8, 8, 5, generator=g)
    expected = reference.wgrad(low.double(), high.double())
    out = torch.empty(6, 4, 4, 5)
    for ours in (Products(reference).wgrad(low, high), Products(reference).wgrad(low, high, out=out)):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous()
    halves = Products(reference).wgrad(low.bfloat16(), high.bfloat16())
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves.double(), expected, rtol=2e-2, atol=0.2)


def test_the_library_computes_float32_as_the_launcher_was_told(monkeypatch):
    """Whatever PyTorch's switch says: it is put back afterwards."""
    seen = []

    def conv2d(*_, **__):
        seen.append(torch.backends.cudnn.allow_tf32)
        raise RuntimeError

    monkeypatch.setattr("kernels.library.F.conv2d", conv2d)
    for switch in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", switch)
        for precision in ("tf32", "ieee"):
            with pytest.raises(RuntimeError):
                Products(reference).conv(torch.zeros(1, 4, 4, 2), torch.zeros(2, 4, 4, 2), precision=precision)
        assert torch.backends.cudnn.allow_tf32 is switch
    assert seen == [True, False, True, False]


def test_arguments_one_too_many_or_given_twice_are_refused():
    names = ["epilogue", "precision"]
    assert launchers.by_name(names, (1,), {"precision": 2}) == {"epilogue": 1, "precision": 2}
    with pytest.raises(TypeError, match="3 arguments by position: at most 2"):
        launchers.by_name(names, (1, 2, 3), {})
    with pytest.raises(TypeError, match="epilogue: given by position and by name"):
        launchers.by_name(names, (1,), {"epilogue": 1})
