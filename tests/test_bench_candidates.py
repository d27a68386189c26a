"""The tiles that a search tries, and what their compilation says of them; no GPU is asked."""

import json
from dataclasses import fields

import pytest

pytest.importorskip("triton")

from bench.subjects.problems import Problem, Use, distinct, other_problems, step_problems
from bench.tuning import lab, precompile
from bench.tuning.candidates import MOST, candidates
from bench.tuning.lab import compile_fault, shapes
from bench.tuning.precompile import DIED, Compiler
from dcgan.arch import PRESETS
from kernels import tuning
from kernels._triton.config import SHARED_LIMIT_BYTES, ConvConfig, WgradConfig, tma_fits

ARCH = PRESETS["dcgan64"].arch


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("preset", ["dcgan64", "mnist28"])
def test_candidates_fit_their_problem_and_their_device(preset, precision, arch):
    for problem in distinct(step_problems(PRESETS[preset].arch, 7, precision)):
        found = candidates(problem, arch)
        assert found and len(found) == len(set(found)) <= 36
        size = {"bf16": 2}.get(precision, 4)
        for c in found[1:]:
            depth = c.depth
            assert c.stages * (c.rows + c.columns) * depth * size <= SHARED_LIMIT_BYTES[arch]
            assert c.rows * c.columns // (32 * c.warps) <= MOST and (c.tma or c.warps == 4)
            image = problem.kernel == "conv_transpose" and problem.out <= 4
            ends = (problem.into,) if image else (problem.into, problem.out)
            assert not c.tma or (arch >= 90 and precision != "fp32" and tma_fits(ends, size))
            assert not (c.tma and problem.kernel == "conv") or problem.into % depth == 0
            names = {field.name for field in fields(WgradConfig if problem.kernel == "wgrad" else ConvConfig)}
            sizes = [getattr(c, name) for name in names - {"tma", "stages", "split"}]
            assert all(n > 0 and n & (n - 1) == 0 for n in sizes)


def test_the_default_tile_is_the_launcher_s():
    for problem in distinct(step_problems(ARCH, 128, "bf16")):
        own = lab.launches_of(problem, None, 90)[0]
        as_candidate = lab.launches_of(problem, candidates(problem, 90)[0], 90)[0]
        assert (own.grid, own.warps, own.stages) == (as_candidate.grid, as_candidate.warps, as_candidate.stages)
        sizes = ("BI", "BH", "BW", "BN", "BK", "BM", "SPLIT", "TMA")
        assert all(own.arguments.get(name) == as_candidate.arguments.get(name) for name in sizes), problem


def test_shapes_are_the_table_s_entries_with_all_their_uses():
    found = {shape.name: shape for shape in shapes(ARCH, (128,), "bf16")}
    d4_and_g2 = found["conv/256x512@8/bf16/b128"]  # D4's forward frozen, and G2's data gradient
    assert {use.mode for use in d4_and_g2.uses} == {"statistics", "batch_norm_grad"}
    assert found["conv/256x512@8/bf16/b256"].uses == (Use("statistics", "none", 2, True),)
    both = {shape.name: shape for shape in shapes(ARCH, (128, 256), "bf16")}
    assert {use.groups for use in both["conv/256x512@8/bf16/b256"].uses} == {1, 2}, "D's at 128, frozen D's at 256"
    assert "wgrad/512x256@4/bf16/b256" in found and len(shapes(ARCH, (128, 128), "bf16")) == len(found)


def test_products_take_their_inputs_as_the_device_s_table_has_them(tmp_path, monkeypatch):
    inputs = {
        "conv_forward": {"128x256@16": {"bf16": {"128": "deferred"}}},  # and D4's, which is near
        "conv_transpose": {"64x3@32": {"bf16": {"128": "applied"}}},
    }
    (tmp_path / "nvidia-test-1.json").write_text(json.dumps({"device": "NVIDIA Test 1", "inputs": inputs}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()

    def deferred(problems):
        return {p.name("") for p in problems if p.use.before}

    onto_image = {f"{name} deferred//bf16/b128" for name in ("conv_transpose/G5/forward", "wgrad/G5/wgrad")}
    assert deferred(step_problems(ARCH, 128)) == onto_image
    found = deferred(step_problems(ARCH, 128, "bf16", "NVIDIA Test 1"))
    assert found == {f"conv/{name}/forward deferred//bf16/b128" for name in ("D3", "D4")}
    others = list(other_problems(ARCH, 128))
    assert len(others) == 14 and len(deferred(others)) == 12 and not deferred(others) & onto_image
    tuning.forget()


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([{"registers": 9, "spills": 4, "shared_bytes": 0}], "spills 4 bytes"),
        ([{"registers": 9, "spills": 0, "shared_bytes": 1 << 20}], "shared memory"),
        (DIED, DIED),
        ([{"registers": 9, "spills": 0, "shared_bytes": 0}], None),
    ],
)
def test_what_a_compilation_says(found, why):
    said = compile_fault(found, 90)
    assert said is None if why is None else why in said


def dies(*_):
    import os

    os._exit(1)


def test_workers_that_die_are_a_reason_and_what_others_compile_is_found_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    job = (Problem("wgrad", 16, 16, 4, 2), None, 90)
    with Compiler(90, workers=1) as compiler:
        assert compiler.compile(dies, [()]) == [DIED]
        (found,) = compiler.compile(lab.launches_of, [job])
    assert found[0]["registers"] > 0 and found[0]["spills"] == 0, found
    cubins = set(tmp_path.rglob("*.cubin"))
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", precompile.target_driver(90))
    assert precompile.compile_one(lab.launches_of, job) == found and set(tmp_path.rglob("*.cubin")) == cubins != set()
