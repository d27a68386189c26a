"""The floor of dcgan64's step against the numbers of the design's table, row by row."""

import json
import subprocess
import sys

import pytest

from bench.roofline import ADAM_BYTES, Ceilings, floor, moved_bytes, step_kernels, table
from dcgan.arch import PRESETS, Arch
from kernels.geometry import Layer

ARCH = PRESETS["dcgan64"].arch

# Section, layers, M×N×K of the first, GF of each, MB and µs one by one: the design's table.
ROWS = [
    ("G fwd", ["G1"], "128×8192×100", 0.21, [3.8], [0.9]),
    ("G fwd", ["G2", "G3", "G4"], "8192×256×2048", 8.59, [10.5, 13.6, 25.4], [10.9] * 3),
    ("G fwd", ["G5"], "524288×3×256", 0.81, [19.9], [4.6]),
    ("D fwd", ["D1"], "262144×64×48", 1.61, [39.9], [9.3]),
    ("D fwd", ["D2", "D3", "D4"], "65536×128×1024", 17.2, [50.6, 26.2, 16.8], [21.7] * 3),
    ("D dgrad", ["D4", "D3", "D2"], "16384×256×2048", 17.2, [29.4, 51.4, 100.9], [21.7, 21.7, 23.5]),
    ("D wgrad", ["D4", "D3", "D2"], "512×4096×4096", 17.2, [25.2, 35.7, 67.6], [21.7] * 3),
    ("D wgrad", ["D1"], "64×48×262144", 1.61, [39.9], [9.3]),
    ("G dgrad", ["G5"], "131072×64×48", 0.81, [36.7], [8.5]),
    ("G dgrad", ["G4", "G3", "G2"], "32768×128×1024", 8.59, [50.6, 26.2, 16.8], [11.8, 10.9, 10.9]),
    ("G wgrad", ["G5"], "64×48×131072", 0.81, [19.9], [4.6]),
    ("G wgrad", ["G4", "G3", "G2"], "128×1024×32768", 8.59, [42.5, 23.1, 18.9], [10.9] * 3),
    ("G wgrad", ["G1"], "100×8192×128", 0.21, [7.5], [1.7]),
    ("G step: D dgrad", ["D1"], "524288×3×256", 0.81, [23.1], [5.4]),
]
# section -> kernels, GF, MB, µs of the whole section
SECTIONS = [
    ("D head", 2, 0.01, 12.6, 2.9),
    ("G step: D fwd", 5, 26.6, 71.6, 37.7),
    ("G step: D dgrad", 5, 26.6, 120.9, 39.9),
    ("Adam", 2, 0.0, 190, 44.2),
]


def rounds_to(value: float, written: float) -> bool:
    """Whether `value` rounds to `written` at as many decimals as `written` has."""
    decimals = len(str(written).partition(".")[2]) if isinstance(written, float) else 0
    return abs(value - written) <= 0.5000001 * 10**-decimals


@pytest.mark.parametrize(
    "section, layers, view, gflop, mbytes, micros", ROWS, ids=lambda v: str(v) if isinstance(v, str) else ""
)
def test_rows_are_the_designs(section, layers, view, gflop, mbytes, micros):
    kernels = {k.layer: k for k in step_kernels(ARCH, 128) if k.section == section}
    assert kernels[layers[0]].view == view
    for name, mb, us in zip(layers, mbytes, micros, strict=True):
        row = floor([kernels[name]])
        assert rounds_to(row.gflop, gflop), (name, row)
        assert rounds_to(row.mbytes, mb), (name, row)
        assert rounds_to(row.floor_us, us), (name, row)


@pytest.mark.parametrize(
    "section, count, gflop, mbytes, micros", SECTIONS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_sections_are_the_designs(section, count, gflop, mbytes, micros):
    part = floor([k for k in step_kernels(ARCH, 128) if k.section == section])
    assert part.kernels == count
    assert rounds_to(part.gflop, gflop)
    assert rounds_to(part.mbytes, mbytes)
    assert abs(part.floor_us - micros) <= 0.11  # the sums in the table were taken of rounded rows


def test_the_step_at_batch_128():
    step = floor(list(step_kernels(ARCH, 128)))
    assert (step.kernels, round(step.gflop), round(step.mbytes)) == (39, 291, 1194)
    assert (round(step.floor_us), round(step.compute_us)) == (460, 369)


def test_the_step_at_batch_1024():
    step = floor(list(step_kernels(ARCH, 1024)))
    assert (step.kernels, round(step.gflop), round(step.mbytes / 1e3, 2)) == (39, 2329, 7.80)
    assert round(step.floor_us / 1e3, 2) == 3.36


def test_bytes_of_each_pass_counted_by_hand():
    layer = Layer("D2", "conv", 2, 3, 8, 4, 2, 1, True, "leaky_relu")  # 5 images: input 640, output 240, weight 96
    assert moved_bytes(layer, "forward", 5) == 2 * (640 + 96 + 240)
    assert moved_bytes(layer, "dgrad", 5) == 2 * (240 + 240 + 96 + 640 + 640)
    assert moved_bytes(layer, "wgrad", 5) == 2 * (240 + 240 + 640) + 4 * 96
    bare = Layer("D2", "conv", 2, 3, 8, 4, 2, 1, False, "leaky_relu")
    assert moved_bytes(bare, "dgrad", 5) == 2 * (240 + 96 + 640 + 640)
    assert moved_bytes(bare, "wgrad", 5) == 2 * (240 + 640) + 4 * 96
    assert ADAM_BYTES == 30


def test_the_floor_is_the_greater_of_the_two_and_follows_its_ceilings():
    kernels = list(step_kernels(ARCH, 128))
    fast_memory, fast_cores = Ceilings(tbps=1e9), Ceilings(tflops=1e9)
    assert floor(kernels, fast_memory).floor_us == pytest.approx(floor(kernels).compute_us)
    assert floor(kernels, fast_cores).floor_us == pytest.approx(sum(k.bytes for k in kernels) / 4.3e12 * 1e6)
    assert floor(kernels, Ceilings(395, 2.15)).floor_us == pytest.approx(2 * floor(kernels).floor_us)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_floor(preset):
    arch = PRESETS[preset].arch
    kernels = list(step_kernels(arch, 7))
    depth = len(arch.generator)
    assert len(kernels) == 8 * depth - 1  # 39 for five layers a network
    assert all(k.bytes > 0 and k.floor_us(Ceilings()) > 0 for k in kernels)
    assert sum(k.bytes for k in kernels if k.section == "Adam") == 30 * sum(
        layer.parameters for layer in (*arch.generator, *arch.discriminator)
    )


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch is 0"):
        list(step_kernels(Arch(), 0))


def test_the_command_prints_the_table_and_json():
    text = table(list(step_kernels(ARCH, 128)), Ceilings())
    assert "step, 39 kernels" in text and "compute alone 369 µs" in text
    command = [sys.executable, "-m", "bench.roofline", "--preset", "mnist28", "--batch", "3", "--json"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    expected = floor(list(step_kernels(PRESETS["mnist28"].arch, 3)))
    assert printed["step"]["mbytes"] == pytest.approx(expected.mbytes)
    assert len(printed["kernels"]) == printed["step"]["kernels"]


def test_the_command_refuses_a_ceiling_of_zero():
    command = [sys.executable, "-m", "bench.roofline", "--tbps", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--tbps 0.0" in done.stderr
