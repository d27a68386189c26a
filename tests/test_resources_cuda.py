"""What nvcc makes of the extension's kernels; and that the check can fail."""

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench import resources, resources_cuda
from bench.resources_cuda import (
    Kernel,
    compile_source,
    faults,
    find_cuobjdump,
    find_nvcc,
    parse_ptxas,
    parse_sass,
    parse_serialized,
    short,
)

NEEDS_NVCC = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
GOOD = Kernel("conv_sm90.cu", "conv_sm90_kernel<bf16, 128, true>", 168, 0, 0, matrix=12, wgmma=12, tma=9)

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90a'
ptxas info    : Function properties for _Z5firstPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90a'
ptxas info    : Function properties for _Z6secondPf
    16 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 128 registers
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function '_Z6secondPf'
"""
SASS = """\
\t\tFunction : _Z5firstPf
        /*0010*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;
        /*0020*/  UTMALDG.4D [UR8], [UR10] ;
        /*0030*/  UTMALDG.2D [UR8], [UR10] ;
\t\tFunction : _Z6secondPf
        /*0010*/  HMMA.16816.F32 R4, R8, R12, R4 ;
"""


def test_what_the_assembler_says_is_read():
    assert parse_ptxas(PTXAS) == {"_Z5firstPf": (40, 0, 1024), "_Z6secondPf": (128, 24, 0)}
    assert parse_serialized(PTXAS) == {"_Z6secondPf"}
    code = parse_sass(SASS)
    assert [code["_Z5firstPf"][kind] for kind in ("matrix", "wgmma", "tma")] == [1, 1, 2]
    assert [code["_Z6secondPf"][kind] for kind in ("matrix", "wgmma", "tma")] == [1, 0, 0]


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "void (anonymous namespace)::image_conv_kernel<__nv_bfloat16, 3, ((anonymous namespace)::Mode)2>"
            "((anonymous namespace)::Arguments<__nv_bfloat16>)",
            "image_conv_kernel<bf16, 3, 2>",
        ),
        ("(anonymous namespace)::sum_shares(float const*, float*, long, long)", "sum_shares"),
        ("_Z5firstPf", "_Z5firstPf"),
    ],
)
def test_names_are_short(name, expected):
    assert short(name) == expected


def test_faults_are_named():
    assert faults(GOOD, "sm_90") == []
    assert faults(replace(GOOD, spills=8), "sm_90") == ["spills 8 bytes per thread to local memory"]
    assert "static shared memory" in faults(replace(GOOD, shared_bytes=49 << 10), "sm_90")[0]
    assert faults(replace(GOOD, wgmma=0), "sm_90") == ["does not use wgmma"]
    assert faults(replace(GOOD, tma=0), "sm_90") == ["does not load by TMA"]
    early = replace(GOOD, early=2)
    assert faults(early, "sm_90") == faults(early, "sm_100")
    assert faults(early, "sm_90") == ["touches memory 2 times before it has waited for the launch before"]
    assert faults(early, "sm_80") == [] == faults(replace(GOOD, early=0), "sm_90")
    assert faults(replace(GOOD, serialized=True), "sm_90") == ["has its wgmma serialized"]
    assert faults(replace(GOOD, matrix=0, wgmma=0, tma=0), "sm_80") == []  # empty there, and never launched
    image = replace(GOOD, name="image_conv_kernel<fp16, 3, 0>", matrix=0)
    assert faults(image, "sm_80") == ["does not use the tensor cores"]
    assert faults(replace(image, name="image_conv_kernel<float, 3, 0>"), "sm_80") == []
    assert faults(replace(image, matrix=None), "sm_80") == []  # no disassembler: not known


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["resources", "--cuda", *arguments])
    code = resources.main()
    return code, capsys.readouterr()


def test_exit_codes(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.cu").touch()
    monkeypatch.setattr(resources_cuda, "CSRC", tmp_path)
    monkeypatch.setattr(resources_cuda, "find_nvcc", lambda: None)
    code, printed = run(monkeypatch, capsys)
    assert code == 2 and "nvcc was not found" in printed.err and not printed.out
    monkeypatch.setattr(resources_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(resources_cuda, "compile_source", lambda *arguments: [GOOD])
    assert run(monkeypatch, capsys)[0] == 0
    assert run(monkeypatch, capsys, "--only", "nothing")[0] == 1
    monkeypatch.setattr(resources_cuda, "compile_source", lambda *arguments: [replace(GOOD, spills=4), GOOD])
    code, printed = run(monkeypatch, capsys, "--json", "--arch", "sm_80")
    rows = json.loads(printed.out)
    assert code == 1 and rows["failed"] == 1 and rows["arch"] == "sm_80" and rows["rows"][0]["spills"] == 4

    def broken(*arguments):
        raise RuntimeError("a.cu does not compile")

    monkeypatch.setattr(resources_cuda, "compile_source", broken)
    code, printed = run(monkeypatch, capsys)
    assert code == 1 and "a.cu does not compile" in printed.err


SPILLING = """\
__global__ void __launch_bounds__(1024, 2) planted(float* x) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[(95 - i) * 1024 + threadIdx.x] = v[i] * v[(i * 7 + 3) % 96];
}
"""


@NEEDS_NVCC
def test_a_planted_spill_is_found_and_broken_code_reported(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(SPILLING)
    (kernel,) = compile_source(find_nvcc(), source, "sm_90", find_cuobjdump())
    spill, early = faults(kernel, "sm_90")
    assert kernel.spills and "spills" in spill and kernel.matrix == 0 and kernel.early >= 192 and "waited" in early
    source.write_text("__global__ void broken( {")
    with pytest.raises(RuntimeError, match=r"planted\.cu does not compile for sm_90"):
        compile_source(find_nvcc(), source, "sm_90")


@NEEDS_NVCC
@pytest.mark.parametrize(
    "arch", [a if a == "sm_90" else pytest.param(a, marks=pytest.mark.long) for a in resources.ARCHES]
)
def test_every_kernel_ships(arch, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "--arch", arch, "--json")
    rows = json.loads(printed.out)["rows"]
    assert code == 0, [(row["name"], row["faults"]) for row in rows if row["faults"]]
    if find_cuobjdump() and arch == "sm_90":
        assert all(row["wgmma"] and row["tma"] for row in rows if row["source"] == "conv_sm90.cu")
