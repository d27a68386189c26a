"""`dcgan.doctor`: a line for each op and layer of a preset, with the backend and the reason."""

import json
from types import SimpleNamespace

import pytest
import torch

from dcgan import doctor
from dcgan.arch import PRESETS
from dcgan.backends import fused_step
from dcgan.errors import InputError
from kernels import tuning


def test_on_a_cpu_every_op_and_layer_is_named_with_the_reason(capsys):
    doctor.main(["--preset", "mnist28", "--device", "cpu"])
    out = capsys.readouterr().out
    machine, ops, step = out.split("\n\n")
    assert f"torch       {torch.__version__}" in machine and "extension" in machine and "CPU" in machine
    arch = PRESETS["mnist28"].arch
    names = [layer.name for layer in arch.generator + arch.discriminator]
    assert [line.split()[0] for line in ops.splitlines()[1:]][: len(names)] == names
    for op in ("gan_loss", "adam_step", "gather_images"):
        assert any(op in line and line.endswith("eager     the tensor is on cpu") for line in ops.splitlines()), op
    assert [line.split()[0] for line in step.splitlines()[1:]] == names
    assert "from or to one pixel: a plain matrix product" in step


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as the choice of a backend looks, with a table."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA Test 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    properties = SimpleNamespace(name="NVIDIA Test 1", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: properties)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    table = {
        "device": "NVIDIA Test 1",
        "ops": {
            "conv_bn_act": {"64x128@32": {"bf16": {"64": "triton"}}},
            "gan_loss": {"any": {"bf16": {"128": "eager"}}},
        },
        "tiles": {"wgrad": {"128x64@16": {"bf16": {"256": {"recipe": "library"}}}}},
        "inputs": {"conv_forward": {"128x256@16": {"bf16": {"128": "deferred"}}}},
    }
    (tmp_path / "nvidia-test-1.json").write_text(json.dumps(table))
    tuning.forget()
    yield torch.device("cuda")
    tuning.forget()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_on_a_gpu_the_table_decides_and_the_reason_says_where_it_has_nothing(gpu):
    preset = PRESETS["dcgan64"]
    rows = {(layer, op): (backend, why) for layer, op, backend, why in doctor.ops(preset, gpu, torch.bfloat16)}
    assert rows["D2", "conv_bn_act"] == ("triton", "fastest in the tuned table")
    assert rows["D", "gan_loss"] == ("eager", "fastest in the tuned table")
    assert rows["D1", "conv_act"][0] == "eager" and "no conv_act in bf16 on 3x64@64" in rows["D1", "conv_act"][1]
    rows = fused_step(preset.arch, preset.batch_size, gpu, torch.bfloat16, "bf16")
    step = {(layer, op): (backend, why) for layer, op, backend, why in rows}
    assert step["D2", "wgrad"] == ("library", "fastest at 128x64@16, 256 images")
    assert step["D2", "conv"] == ("triton", "the default tile: the tuned table has nothing near")
    assert step["G1", "matmul"][0] == "library" and step["D5", "head"][0] == "triton"
    kernels = {op for layer, op in step if layer == "G3"}
    assert kernels == {"conv", "conv_transpose", "wgrad", "input's batch norm"}
    default = "the default: the tensor cores would wait for it"
    assert step["G5", "input's batch norm"] == ("deferred", "the default: bound by memory")
    assert step["D3", "input's batch norm"] == ("applied", default)
    assert step["D3", "  where D is frozen"] == ("deferred", "fastest at 128x256@16, 128 images")
    normed = {layer for layer, op in step if op == "input's batch norm"}
    assert normed == {"G2", "G3", "G4", "G5", "D3", "D4"}, "D1 has none, and D5's is applied by the head"
    assert dict(doctor.machine(gpu))["tuned table"] == "4 entries"


def test_a_device_that_is_none_is_refused():
    with pytest.raises(InputError, match="device"):
        doctor.main(["--device", "abacus"])
