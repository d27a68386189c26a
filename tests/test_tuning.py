"""Tuned tables: what is read from them, what is refused, and what they make the ops and the launchers do."""

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import kernels
from kernels import dispatch, launchers, tuning
from kernels._triton.config import ConvConfig, WgradConfig
from kernels.dispatch import BackendError, select, use_backend
from kernels.geometry import Epilogue, Layer

NAME = "NVIDIA Test 1"
CONV = ConvConfig(2, 8, 8, 64, 32, 4, 3, True)
WGRAD = WgradConfig(2, 4, 4, 64, 64, 6, 4, 3, False)
TABLE = {
    "device": NAME,
    "torch": "2.11.0",
    "ops": {
        "conv_bn_act": {
            "64x128@32": {"bf16": {"128": "triton", "1024": "library"}, "fp32": {"128": "eager"}},
            "3x64@64": {"bf16": {"256": "cuda"}},
        },
        "gan_loss": {"any": {"bf16": {"256": "triton"}}},
    },
    "tiles": {
        "conv": {
            "64x128@32": {
                "bf16": {
                    "128": {"recipe": "triton", "tile": asdict(CONV), "us": 12.3},
                    "1024": {"recipe": "library", "us": 40.0},
                }
            }
        },
        "wgrad": {"128x64@16": {"bf16": {"128": {"recipe": "triton", "tile": asdict(WGRAD)}}}},
    },
}
LAYER = Layer("L", "conv", 64, 128, 32, 4, 2, 1, True, "leaky_relu")
GPU = torch.device("cuda")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table for a GPU that the tests pretend to have."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(dispatch, "_warned", set())

    def write(content=TABLE):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "nvidia-test-1.json").write_text(text)
        tuning.forget()

    tuning.forget()
    yield write
    tuning.forget()


def chosen(images=128, dtype=torch.bfloat16, layer=LAYER, **options):
    return select("conv_bn_act", layer, GPU, dtype, images=images, **options)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        pytest.param(128, "triton", id="as measured"),
        pytest.param(300, "triton", id="nearer to 128"),
        pytest.param(400, "library", id="nearer to 1024"),
        pytest.param(4096, "library", id="four times as many as measured"),
        pytest.param(32, "triton", id="a quarter of what was measured"),
    ],
)
def test_the_nearest_number_of_images_decides(table, images, expected):
    table()
    choice = chosen(images)
    assert choice.backend == expected and choice.why.startswith("fastest in the tuned table")
    assert ("(at 64x128@32, " in choice.why) == (images != 128)


@pytest.mark.parametrize(
    ("into", "out", "size", "found"),
    [(128, 128, 32, True), (64, 128, 16, True), (64, 257, 32, False), (31, 128, 32, False), (64, 128, 70, False)],
)
def test_a_near_layer_will_do_and_a_far_one_will_not(table, into, out, size, found):
    table()
    layer = Layer("L", "conv", into, out, size, 4, 2, 1, True, "leaky_relu")
    if found:
        assert chosen(layer=layer).backend == "triton"
    else:
        with pytest.warns(RuntimeWarning, match=rf"has no conv_bn_act in bf16 on {into}x{out}@{size} of 128 images"):
            assert chosen(layer=layer).backend == "eager"


def test_a_layer_s_own_entry_goes_before_a_nearer_number_of_images(table):
    ops = {"64x128@32": {"bf16": {"512": "library"}}, "64x128@16": {"bf16": {"128": "triton"}}}
    table({"device": NAME, "ops": {"conv_bn_act": ops}})
    assert chosen(128).backend == "library"


def test_too_few_or_too_many_images_fall_back_with_a_warning_and_raise_under_strict(table, monkeypatch):
    table()
    for images in (31, 4097):
        monkeypatch.setattr(dispatch, "_warned", set())
        with pytest.warns(RuntimeWarning, match=f"of {images} images"):
            assert chosen(images).backend == "eager"
    with use_backend("auto", strict=True), pytest.raises(BackendError, match="of 31 images"):
        chosen(31)


def test_the_precision_decides(table, monkeypatch):
    table()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert chosen(dtype=torch.float32) == ("eager", "fastest in the tuned table")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.warns(RuntimeWarning, match="no conv_bn_act in tf32"):
        assert chosen(dtype=torch.float32).backend == "eager"
    with pytest.warns(RuntimeWarning, match="float64"):
        assert chosen(dtype=torch.float64).backend == "eager"


def test_a_recipe_that_cannot_run_falls_back_and_says_why(table, monkeypatch):
    table()
    monkeypatch.setattr("kernels._cuda.why_not", lambda *_: "the extension is not here")
    image = Layer("D1", "conv", 3, 64, 64, 4, 2, 1, True, "leaky_relu")
    with pytest.warns(RuntimeWarning, match="the extension is not here"):
        assert chosen(256, layer=image).backend == "eager"


def test_an_op_without_a_layer_has_its_own_key(table):
    table()
    assert select("gan_loss", None, GPU, torch.bfloat16, images=256).backend == "triton"
    with pytest.warns(RuntimeWarning, match="has no gan_loss in bf16 of 5 images"):
        assert select("gan_loss", None, GPU, torch.bfloat16, images=5).backend == "eager"


def test_adam_s_size_is_of_parameters(table):
    table(TABLE | {"ops": {"adam_step": {"any": {"bf16": {"1000": "triton"}}}}})
    with pytest.warns(RuntimeWarning, match="has no adam_step in bf16 of 5 parameters, nor a near one"):
        assert select("adam_step", None, GPU, torch.bfloat16, images=5).backend == "eager"
    found = select("adam_step", None, GPU, torch.bfloat16, images=2000)
    assert found == ("triton", "fastest in the tuned table (at 1000 parameters)")


def test_a_reason_is_said_once_for_an_op_whatever_the_shape(table, recwarn):
    table()
    for images in (3, 5, 31):
        for channels in (7, 8):
            chosen(images, layer=Layer("L", "conv", channels, 9, 8, 4, 2, 1, True, "relu"))
            chosen(images, torch.float64)
    select("gan_loss", None, GPU, torch.bfloat16, images=1)
    said = [str(warning.message).split(" falls back to eager PyTorch: ") for warning in recwarn.list]
    assert [(op, "float64" in why, "has no" in why) for op, why in said] == [
        ("conv_bn_act", False, True),
        ("conv_bn_act", True, False),
        ("gan_loss", False, True),
    ]


def test_evaluation_with_a_gradient_falls_back_and_says_why(table, monkeypatch):
    table()
    op = sys.modules["kernels.conv_bn_act"]
    monkeypatch.setattr(op, "backend_of", lambda op, layer, device, *rest: dispatch.backend_of(op, layer, GPU, *rest))
    x, weight, ones = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 4, 4, requires_grad=True), torch.ones(4)

    def run():
        return kernels.conv_bn_act(x, weight, ones, ones, ones.clone(), ones.clone(), training=False)

    with pytest.warns(RuntimeWarning, match="conv_bn_act falls back to eager PyTorch: training=False has no backward"):
        assert run().requires_grad
    with use_backend("auto", strict=True), pytest.raises(BackendError, match="training=False has no backward"):
        run()


@pytest.mark.parametrize("way", ["select", "an op", "a fused model"])
def test_a_warning_points_at_who_called_the_package(table, monkeypatch, way):
    real = dispatch.backend_of
    for module in ("conv_act", "gan_loss"):
        monkeypatch.setattr(
            sys.modules[f"kernels.{module}"], "backend_of",
            lambda op, layer, device, *rest: real(op, layer, GPU, *rest),
        )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="no tuned table") as caught:
        if way == "select":
            chosen()
        elif way == "an op":
            kernels.gan_loss(torch.zeros(4), (True,))
        else:
            kernels.FusedSequential(torch.nn.Conv2d(3, 4, 4, 2, 1, bias=False))(torch.zeros(1, 3, 4, 4))
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


def test_without_a_table_auto_warns_once_and_strict_raises(table):
    with pytest.warns(RuntimeWarning, match=f"no tuned table for {NAME}") as caught:
        assert [chosen().backend for _ in range(3)] == ["eager"] * 3
    assert len(caught) == 1
    with use_backend("auto", strict=True), pytest.raises(BackendError, match="no tuned table"):
        chosen()
    assert chosen(backend="triton") == ("triton", "asked for by name")


def changed(path, value):
    """The table with one thing replaced."""
    copy = json.loads(json.dumps(TABLE))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return copy


TILE = ("tiles", "conv", "64x128@32", "bf16", "128")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param("{", "Expecting", id="half a file"),
        pytest.param("[]", "its device is None", id="a list"),
        pytest.param(changed(("device",), "NVIDIA Test 2"), "its device is 'NVIDIA Test 2'", id="another device's"),
        pytest.param(changed(("ops",), 3), "a section is int", id="a section that is a number"),
        pytest.param(changed(("ops", "conv_bn_act", "64x128"), {"bf16": {"1": "cuda"}}), "'64x128' is not", id="a key"),
        pytest.param(
            changed(("ops", "conv_bn_act", "0x1@4"), {"bf16": {"1": "cuda"}}), "0x1@4/bf16/1", id="no channels"
        ),
        pytest.param(changed(("ops", "conv_bn_act", "64x128@32", "fp8"), {"1": "cuda"}), "fp8", id="a precision"),
        pytest.param(changed(("ops", "conv_bn_act", "64x128@32", "bf16", "0"), "cuda"), "bf16/0", id="no images"),
        pytest.param(changed(("ops", "conv_bn_act", "64x128@32", "bf16", "64"), "metal"), "'metal'", id="a recipe"),
        pytest.param(changed(("ops", "conv_bn_act", "64x128@32", "bf16", "64"), []), "is []", id="no recipe"),
        pytest.param(changed(("tiles", "conv3d"), TABLE["tiles"]["conv"]), "expected one of conv", id="a kernel"),
        pytest.param(changed((*TILE, "tile"), None), "tile is None", id="no tile"),
        pytest.param(changed((*TILE, "tile", "warps"), None), "expected", id="half a tile"),
        pytest.param(changed((*TILE, "tile", "warps"), 3), "warps is 3", id="three warps"),
        pytest.param(changed((*TILE, "tile", "columns"), -64), "columns is -64", id="negative columns"),
        pytest.param(changed((*TILE, "tile", "columns"), 1 << 20), "columns is 1048576", id="a million columns"),
        pytest.param(
            changed(TILE, {"recipe": "cuda", "tile": {"columns": 256, "cluster": 2}}), "columns is 256", id="not cuda's"
        ),
        pytest.param(
            changed(TILE, {"recipe": "cuda", "tile": {"columns": 64}}), "expected cluster, columns", id="half of cuda's"
        ),
        pytest.param("[" * 100_000, "recursion", id="a deep hole"),
        pytest.param(changed((*TILE, "tile", "tma"), 1), "tma is 1", id="a number for a truth"),
        pytest.param(changed((*TILE, "tile", "height"), True), "height is True", id="a truth for a number"),
    ],
)
def test_a_corrupt_or_foreign_table_is_warned_of_once_and_not_used(table, content, said):
    table(content)
    with pytest.warns(RuntimeWarning) as caught:
        assert all(chosen(images).backend == "eager" for images in (128, 256))
        assert tuning.tile(NAME, "conv", (64, 128, 32), "bf16", 128) is None
    messages = [str(w.message) for w in caught]
    about = [message for message in messages if message.startswith("the tuned table nvidia-test-1.json cannot be used")]
    assert len(about) == 1 and said in about[0], messages


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_op_selects_while_it_is_traced(table, dynamic):
    """For each number of images anew, and again when `use_backend` changes; in the graph is nothing of it."""
    table()

    def run(x):
        layer = Layer("L", "conv", x.shape[1], 128, x.shape[2], 4, 2, 1, True, "relu")
        backend = dispatch.backend_of("conv_bn_act", layer, GPU, torch.bfloat16, None, x.shape[0])
        return x[0, 0, 0, 0] * {"triton": 2, "library": 3, "eager": 5}[backend]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert [compiled(torch.ones(n, 64, 32, 32)).item() for n in (128, 150, 1000)] == [2, 2, 3]
    with use_backend("eager"):
        assert compiled(torch.ones(128, 64, 32, 32)) == 5


def test_a_tile_that_does_not_fit_the_shape_is_left_out(table):
    table()
    assert tuning.tile(NAME, "conv", (64, 128, 32), "bf16", 128).tile == CONV
    assert tuning.tile(NAME, "conv", (48, 128, 32), "bf16", 128) is None  # 48 channels are no multiple of the depth
    assert tuning.tile(NAME, "wgrad", (127, 63, 16), "bf16", 128).tile == WGRAD  # pointers take any
    assert tuning.tile(NAME, "conv", (64, 128, 32), "fp16", 128) is None


def test_who_applies_a_batch_norm(table):
    """Without a table the layer onto an image; with one, as measured, the forward pass alone apart from both."""
    onto = Layer("G5", "conv_transpose", 64, 3, 32, 4, 2, 1, False, "tanh")
    assert tuning.deferred(None, onto, "bf16", 128)[0] and tuning.deferred(NAME, onto, "bf16", 128)[0]
    assert tuning.deferred(None, LAYER, "bf16", 128) == (False, "the default: the tensor cores would wait for it")
    inputs = {
        "conv": {"64x128@32": {"bf16": {"128": "applied"}}},
        "conv_forward": {"64x128@32": {"bf16": {"128": "deferred"}}},
        "conv_transpose": {"64x3@32": {"bf16": {"128": "applied"}}},
    }
    table(TABLE | {"inputs": inputs})
    assert tuning.deferred(NAME, LAYER, "bf16", 128) == (False, "fastest at 64x128@32, 128 images")
    assert tuning.deferred(NAME, LAYER, "bf16", 256, weights=False)[0]
    assert not tuning.deferred(NAME, onto, "bf16", 128)[0] and tuning.deferred(NAME, onto, "fp16", 128)[0]


def test_how_a_step_is_launched(table):
    """Plain where nothing was measured; else as was fastest at the nearest number of images."""
    assert tuning.dependent(None, "bf16", 128) == tuning.dependent(NAME, "bf16", 128)
    assert tuning.dependent(NAME, "bf16", 128) == (False, "the default: not measured on this device")
    table(TABLE | {"launch": {"step": {"any": {"bf16": {"128": "dependent", "1024": "plain"}}}}})
    assert tuning.dependent(NAME, "bf16", 64) == (True, "fastest at 128 images")
    assert not tuning.dependent(NAME, "bf16", 512)[0] and not tuning.dependent(NAME, "bf16", 8192)[0]
    assert not tuning.dependent(NAME, "fp32", 128)[0]


def test_an_unknown_way_to_apply_is_refused(table):
    table(TABLE | {"inputs": {"conv": {"64x128@32": {"bf16": {"128": "triton"}}}}})
    with pytest.warns(RuntimeWarning, match="recipe is 'triton', accepted are applied, deferred"):
        assert tuning.load(NAME)[0] is None


def tiles_of(kernel, key, tile):
    return TABLE | {"tiles": {kernel: {key: {"bf16": {"128": {"recipe": "triton", "tile": asdict(tile)}}}}}}


def test_a_near_shapes_tile_that_the_launcher_would_refuse_is_left(table):
    """Several taps, for a picture whose taps lie in one row; a box without an inside, for a larger picture."""
    table(tiles_of("wgrad", "64x16@16", WgradConfig(2, 4, 4, 64, 16, 6, 4, 3, False, 4)))
    assert tuning.tile(NAME, "wgrad", (64, 16, 16), "bf16", 128) and not tuning.tile(
        NAME, "wgrad", (64, 8, 16), "bf16", 128
    )
    table(tiles_of("conv_transpose", "64x4@2", ConvConfig(32, 2, 2, 16, 32, 4, 3, False)))
    assert tuning.tile(NAME, "conv_transpose", (64, 4, 2), "bf16", 128)
    assert not tuning.tile(NAME, "conv_transpose", (64, 4, 4), "bf16", 128)
    table(tiles_of("conv_transpose", "64x4@8", ConvConfig(1, 8, 8, 16, 64, 4, 3, True)))
    assert tuning.tile(NAME, "conv_transpose", (64, 3, 8), "bf16", 128), "an image's channels are not loaded by TMA"


def test_the_kernel_onto_an_image_has_tiles_of_its_own(table, monkeypatch):
    """Its tile serves no more channels, and no epilogue that takes sums, which the ordinary kernel does."""
    table(tiles_of("conv_transpose", "64x4@32", ConvConfig(1, 8, 32, 16, 64, 8, 3, True)))
    assert tuning.tile(NAME, "conv_transpose", (64, 3, 32), "bf16", 128)
    assert not tuning.tile(NAME, "conv_transpose", (64, 8, 32), "bf16", 128)
    monkeypatch.setattr(tuning, "device_name", functools.cache(lambda device: NAME))
    x, weight = torch.zeros(128, 32, 32, 64, dtype=torch.bfloat16), torch.zeros(64, 4, 4, 4, dtype=torch.bfloat16)
    assert launchers._entry("conv_transpose", x, weight, {"epilogue": Epilogue("tanh")})
    assert launchers._entry("conv_transpose", x, weight, {"epilogue": Epilogue(statistics=True)}) is None


def test_a_measured_recipe_without_prologues_keeps_its_input_applied(table):
    entry = {"recipe": "cuda", "us": 5.0}
    table(TABLE | {"tiles": {"conv_transpose": {"64x3@32": {"bf16": {"128": entry}}}}})
    onto = Layer("G5", "conv_transpose", 64, 3, 32, 4, 2, 1, False, "tanh")
    assert tuning.deferred(NAME, onto, "bf16", 128) == (False, "the default: the recipe cuda has no prologue")
