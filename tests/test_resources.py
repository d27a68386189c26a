"""What the compiler makes of the kernels for a GPU that is not there; and that the check can fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.resources import (
    Case,
    Resources,
    compile_launch,
    distinct,
    early_accesses,
    faults,
    signature,
    step_cases,
)
from dcgan.arch import PRESETS
from dcgan.errors import run_command
from kernels._triton.config import SHARED_LIMIT_BYTES, ConvConfig, conv_config, wgrad_config
from kernels._triton.conv import prepare_conv
from kernels._triton.launch import arch_of
from kernels.geometry import Epilogue

ARCH = PRESETS["dcgan64"].arch
SAMPLE = (
    "G2 1×128 forward",
    "G5 1×128 forward, deferred",
    "D3 2×128 forward, deferred",
    "D3 2×128 dgrad",
    "D3 2×128 wgrad, deferred",
    "D2 1×128 dgrad",
    "D2 2×128 merge_sums",
)


def test_a_sample_of_the_step_ships_on_sm90():
    seen = {}
    for case in step_cases(ARCH, 128, 90):
        if case.name in SAMPLE and case.name not in seen:
            found = compile_launch(replace(case.launch, dependent=True), 90)
            assert not faults(case, found, 90) and found.early == 0, (case.name, found)
            seen[case.name] = found
    assert set(seen) == set(SAMPLE)
    gemms = [found for name, found in seen.items() if "merge" not in name]
    assert all(found.matrix and found.tma for found in gemms)
    assert not seen["D2 2×128 merge_sums"].tma


def test_what_a_table_may_choose_is_among_the_cases():
    """A batch norm before the layer that reads it and in its load: the default without a word, but onto an image."""
    names = {case.name for case in step_cases(ARCH, 128, 90)}
    both = [f"G{k} 1×128" for k in (2, 3, 4)] + ["D3 2×128", "D4 2×128"]
    words = {f"{layer} {what}{way}" for layer in both for what in ("forward", "wgrad") for way in ("", ", deferred")}
    words |= {f"G5 1×128 {what}, {way}" for what in ("forward", "wgrad") for way in ("applied", "deferred")}
    words |= {f"{layer} 1×128 forward{way}" for layer in ("D3", "D4") for way in ("", ", deferred")}
    words |= {f"{layer} {what}" for layer in ("D1 2×128", "D2 2×128") for what in ("forward", "wgrad")}
    words |= {"D1 1×128 forward", "D2 1×128 forward"}
    assert {name for name in names if "forward" in name or "wgrad" in name} == words


def test_pointer_loads_reach_the_tensor_cores_of_sm80():
    case = next(c for c in step_cases(ARCH, 128, 80) if c.name == "D3 2×128 forward")
    found = compile_launch(case.launch, 80)
    assert not faults(case, found, 80) and found.matrix and not found.tma


def conv_case(config):
    x = torch.empty(128, 16, 16, 128, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(256, 4, 4, 128, dtype=torch.bfloat16, device="meta")
    epilogue = Epilogue("leaky_relu", saved=torch.empty(128, 8, 8, 256, dtype=torch.bfloat16, device="meta"))
    (launch,) = prepare_conv(x, weight, epilogue, config=config).launches
    return Case("planted", launch, True)


def test_the_widest_image_end_fits_the_99_kb_of_sm89():
    """With the batch norm that is applied in its loads by default, which takes room of its own."""
    case = next(c for c in step_cases(PRESETS["paper"].arch, 128, 89, "bf16") if c.name == "G5 1×128 forward, deferred")
    assert not faults(case, compile_launch(case.launch, 89), 89)


def test_a_spill_is_found():
    case = conv_case(ConvConfig(2, 8, 8, 256, 64, warps=4, stages=3, tma=True))  # 256 accumulators a thread
    wrong = faults(case, compile_launch(case.launch, 90), 90)
    assert any("spills" in fault for fault in wrong), wrong


def test_too_much_shared_memory_and_missing_instructions_are_found():
    case = conv_case(ConvConfig(2, 8, 8, 128, 64, warps=4, stages=3, tma=True))
    good = Resources(registers=128, spills=0, shared_bytes=1 << 16, matrix=4, tma=8)
    assert faults(case, good, 90) == []
    assert "shared memory" in faults(case, replace(good, shared_bytes=SHARED_LIMIT_BYTES[90] + 1), 90)[0]
    assert faults(case, replace(good, shared_bytes=SHARED_LIMIT_BYTES[80] + 1), 80)
    assert faults(case, replace(good, matrix=0), 90) == ["does not use the tensor cores"]
    assert faults(case, replace(good, tma=0), 90) == ["does not load by TMA"]
    assert faults(case, replace(good, tma=0), 80) == []
    assert faults(replace(case, matrix=False), replace(good, matrix=0, tma=0), 90) == []
    assert "touches memory 3 times before it has waited" in faults(case, replace(good, early=3), 90)[0]


def test_an_access_before_the_wait_is_counted():
    wait, begin, load = "griddepcontrol.wait; ", "griddepcontrol.launch_dependents; ", "ld.global.b32 %r1, [%rd1]; "
    box = "cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd1]; "
    assert early_accesses("ld.param.b64 %rd1, [x]; " + wait + begin + load) == 0
    assert early_accesses(load + wait + box + begin + load) == 2
    assert early_accesses(wait + load) == 1 and early_accesses(begin + box + load) == 2, "one of the two is missing"
    assert early_accesses("ld.shared.b32 %r1, [%r2]; mbarrier.init.shared::cta.b64 [%r1], 1; " + wait + begin) == 0


def test_a_tile_over_the_limit_is_found_by_compiling_it():
    case = conv_case(ConvConfig(2, 8, 8, 128, 64, warps=8, stages=8, tma=True))
    found = compile_launch(case.launch, 90)
    assert found.shared_bytes > SHARED_LIMIT_BYTES[90]
    assert any("shared memory" in fault for fault in faults(case, found, 90))


def test_signatures_are_what_a_launch_would_specialise_on():
    x = torch.empty(6, 16, 16, 128, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(256, 4, 4, 128, dtype=torch.bfloat16, device="meta")
    config = ConvConfig(2, 8, 8, 128, 64, 8, 4, True)
    (launch,) = prepare_conv(x, weight, Epilogue(), config=config).launches
    types, constants, aligned = signature(launch)
    assert types["x"] == "tensordesc<bf16[2, 8, 1, 8, 64]>" and types["w"] == "tensordesc<bf16[128, 64]>"
    assert types["y"] == "*bf16" and types["per_group"] == "i32"
    assert constants["groups"] == 1 and constants["saved"] is None and constants["BN"] == 128
    assert (list(types).index("y"),) in aligned and (list(types).index("per_group"),) not in aligned


@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize("preset", PRESETS)
def test_default_tiles_fit_their_problem(preset, arch):
    """Every size a power of two, operands of every stage in shared memory, TMA only where TMA can."""
    networks = PRESETS[preset].arch
    for layer in (*networks.generator, *networks.discriminator):
        if layer.stride != 2:
            continue
        low = min(layer.in_size, layer.out_size)
        ends = (layer.in_channels, layer.out_channels)
        for itemsize in (2, 4):
            for kind, channels in (("conv", ends), ("conv_transpose", ends[::-1])):
                c = conv_config(kind, 7, 2, low, low, channels, itemsize, arch)
                sizes = (c.images, c.height, c.width, c.columns, c.depth)
                assert all(n & (n - 1) == 0 for n in sizes) and min(c.rows, c.columns, c.depth) >= 16
                assert c.stages * (c.rows + c.columns) * c.depth * itemsize <= SHARED_LIMIT_BYTES[arch]
                assert not c.tma or (arch >= 90 and min(channels) * itemsize % 16 == 0)
            w = wgrad_config(7, low, low, *ends, itemsize, arch)
            assert all(n & (n - 1) == 0 for n in (w.images, w.height, w.width, w.rows, w.columns)) and w.split >= 1


def test_the_command_exits_1_on_a_fault_and_0_without(monkeypatch, capsys):
    from bench import resources

    good = Resources(registers=128, spills=0, shared_bytes=1 << 16, matrix=4, tma=8)
    monkeypatch.setattr(sys, "argv", ["resources", "--batch", "128", "--only", "D3 2×128 forward", "--json"])
    monkeypatch.setattr(resources, "compile_launch", lambda launch, arch: good)
    assert resources.main() == 0
    monkeypatch.setattr(resources, "compile_launch", lambda launch, arch: replace(good, spills=8))
    capsys.readouterr()
    assert resources.main() == 1
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["rows"]] == ["D3 2×128 forward, deferred", "D3 2×128 forward"]
    fault = ["spills 8 bytes per thread to local memory"]
    assert printed["failed"] == 2 and all(row["faults"] == fault for row in printed["rows"])


@pytest.mark.parametrize("arguments", [("--only", "("), ("--only", "nothing of the kind"), ("--batch", "0")])
def test_wrong_input_is_exit_code_2(monkeypatch, capsys, arguments):
    from bench import resources

    monkeypatch.setattr(resources, "step_cases", lambda *_: iter(()))
    monkeypatch.setattr(sys, "argv", ["resources", *arguments])
    assert run_command(resources.main) == 2
    printed = capsys.readouterr()
    assert " ".join(arguments) in printed.err and not printed.out


def test_interpreted_kernels_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "bench.resources"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(
    "capability, arch",
    [((8, 0), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 89)],
)
def test_each_gpu_gets_tiles_that_fit_it(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arch_of(SimpleNamespace(device=torch.device("cuda"))) == arch


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 7\.5"):
        arch_of(SimpleNamespace(device=torch.device("cuda")))


def test_equal_kernels_are_compiled_once():
    cases = list(step_cases(ARCH, 128, 90))
    assert 40 < len(list(distinct(cases))) < len(cases)
    assert len(list(distinct([cases[0], cases[0]]))) == 1
