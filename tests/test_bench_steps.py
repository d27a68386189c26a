"""The stage `step`: what it measures and in which order, the ablation's figures, sampling, kernels compiled ahead; and
what a GPU's ceilings lose when it cannot do one of them."""

import json
from dataclasses import replace

import pytest
import runs
import torch

from bench import ceilings, group, stages, suite
from bench.group import Bench, Group, Plan
from bench.overview import line
from bench.peers import ladder, without
from bench.peers.ladder import Rung
from bench.stages import ahead, sampling, steps, tutorial
from bench.subjects.accuracy import arithmetic
from bench.telemetry import Telemetry
from bench.timing import Timed
from dcgan.arch import PRESETS, Arch
from dcgan.fused import FusedStep

ARCH, CPU = Arch(image_size=16, nz=8, ngf=8, ndf=8), torch.device("cpu")
PLAN = Plan(ARCH, CPU, (4,), (2, 4), rounds=4, compile=False, ceiling_sizes=(64, 1 << 16))


def bench_of(tmp_path, plan=PLAN):
    writer = suite.Writer(tmp_path / "rows.jsonl")
    return Bench(plan, tmp_path, writer.emit, Telemetry(CPU)), writer.rows


def test_on_a_gpu_it_has_the_ablation_then_batches_sizes_and_widths(tmp_path, monkeypatch):
    plan = replace(
        PLAN, arch=Arch(), device=torch.device("cuda"), peer_batches=(128, 1024), step_batches=(32, 128, 4096),
        sizes=(32, 64, 256), widths=(64, 256), ablated=(128, 1024), pictures=9,
    )  # fmt: skip
    bench, rows = bench_of(tmp_path, plan)
    ran, compiled = [], []

    def run(self, rungs, seconds):
        ran.append((self.name, self.images, self.arch.image_size, self.arch.ngf, [rung.name for rung in rungs]))

    monkeypatch.setattr(Group, "run", run)
    monkeypatch.setattr(sampling, "sampling", lambda bench, seconds: ran.append(("sampling",)))
    monkeypatch.setattr(tutorial, "tutorial", lambda bench, seconds, count: ran.append(("tutorial", count)))
    monkeypatch.setattr(ahead, "compile_steps", lambda bench, stage, jobs: compiled.extend(jobs))
    bench.summary["b128"] = {}
    steps.step(bench, 1e3)
    parts = ["graph", *(part for part in without.OFF if part != "dependent")]
    whole = ["fused+bf16+graph", *(f"fused+bf16+graph-{part}" for part in parts)]
    three = ["example", "example+bf16+channels_last+frozen+graph", "fused+bf16+graph"]
    assert ran == [
        ("ablation", 128, 64, 64, whole), ("ablation", 1024, 64, 64, whole), ("sampling",),
        ("step", 32, 64, 64, three), ("step", 4096, 64, 64, three),
        ("scaling", 128, 32, 64, three), ("scaling", 128, 256, 64, three), ("scaling", 128, 64, 256, three),
        ("tutorial", 9),
    ]  # fmt: skip
    assert [(row["name"], row["why"]) for row in rows] == [("b128", "measured in the stage peers")]
    whole = Rung("bf16", ours="fused", graph=True)
    assert (Arch(ngf=256, ndf=256), 128, whole) in compiled and (Arch(), 1024, replace(whole, off="merge")) in compiled
    steps.step(bench, -1.0)
    assert [row["name"] for row in rows[2:]][-3:] == ["256px/f64/b128", "64px/f256/b128", "tutorial"]
    assert all("no time left" in row["why"] for row in rows[2:])


def test_parts_are_taken_from_dependent_launches_where_these_were_the_faster_ones(tmp_path):
    bench, _ = bench_of(tmp_path)
    bench.summary["b128"] = {"ours": "fused+bf16+graph+dependent"}
    whole, *parts = steps.ablated(bench, 128)
    assert whole.dependent and [part.off for part in parts] == list(without.PARTS)
    assert not any(rung.dependent or rung.off == "dependent" for rung in steps.ablated(bench, 1024))
    step = FusedStep.__new__(FusedStep)
    step.dependent = True
    without.OFF["dependent"](step)
    assert step.dependent is False


def test_kernels_of_a_dependent_step_are_compiled_apart():
    plain, early = (ahead.step_launches((ARCH, 4, Rung("bf16", ours="fused", dependent=on))) for on in (False, True))
    assert len(plain) == len(early) and not {*map(ahead.specialised, plain)} & {*map(ahead.specialised, early)}
    assert all(launch.options["launch_pdl"] and launch.arguments["DEPENDENT"] for launch in early)


def test_the_suite_asks_for_all_of_that_on_a_gpu_and_for_none_in_a_quick_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = {"batch": None, "preset": "dcgan64", "compile": False}
    plan = suite.plan_of(type("Args", (), options | {"quick": False}))
    assert {32, 4096} <= set(plan.step_batches) and plan.ablated == plan.peer_batches == (128, 1024)
    assert {32, 256} <= set(plan.sizes) and {64, 256} <= set(plan.widths)
    quick = suite.plan_of(type("Args", (), options | {"quick": True}))
    assert plan.pictures == 202_599 and -(-plan.pictures // tutorial.BATCH) * tutorial.EPOCHS == 7_915
    assert not (quick.sizes or quick.widths or quick.ablated or quick.energy or quick.pictures)


def test_sizes_that_the_family_does_not_have_are_left_out():
    dense = PRESETS["dense32"].arch
    assert all(other != dense for other in steps.others(dense, (28, 32, 33), (dense.ngf,)))
    assert [other.image_size for other in steps.others(Arch(), (64, 128, 33), ())] == [128]


def test_another_size_has_its_own_rows_and_floor_and_stays_out_of_the_summary(tmp_path):
    bench, rows = bench_of(tmp_path)
    bench.measured = ceilings.Measured({"fp32": 1.0, "bf16": 1.0}, 1.0)
    saved = []
    bench.save = lambda: saved.append(len(rows))
    Group(bench, "step", 2, "scaling", replace(ARCH, image_size=32)).run([Rung(), Rung(ours="fused")], 100.0)
    assert [(row["ok"], row["image_size"], row["ngf"], row["group"]) for row in rows] == [(True, 32, 8, "scaling")] * 2
    small = Group(bench, "step", 2, "step").roofline(Rung(), 1.0)
    assert rows[0]["roofline"] * rows[0]["p50_ms"] > small and rows[0]["tflops"] > 0
    assert bench.summary == {} and saved == [2]
    assert "32px f8" in line(rows[0])


def test_the_gain_of_a_part_is_the_time_without_it_over_the_time_with_it(tmp_path):
    bench, _ = bench_of(tmp_path)
    whole, off = Rung(ours="fused"), Rung(ours="fused", off="merge")
    timed = Timed({whole.name: [2.0, 2.0, 4.0, 4.0], off.name: [3.0, 3.0, 6.0, 6.0]})
    figures = Group(bench, "step", 2, "ablation").figures(off, timed)
    assert (figures["gain"], figures["noisy"]) == (1.5, False) and "over_example" not in figures
    assert "gain" not in Group(bench, "step", 2, "ablation").figures(whole, timed)
    row = {"suite": "step", "name": off.name, "ok": True, "batch": 2, "off": "merge", **figures, "throttle": ["heat"]}
    assert "without merge 1.50 times as long" in line(row) and "throttled: heat" in line(row)


def test_every_part_that_is_off_stands_beside_the_whole(tmp_path, monkeypatch):
    bench, _ = bench_of(tmp_path)
    rungs = []
    monkeypatch.setattr(Group, "run", lambda self, given, seconds: rungs.extend(given))
    steps.ablation(bench, 4, 1.0)
    timed = Timed({rung.name: [1.0 + i] * 4 for i, rung in enumerate(rungs)})
    gains = [Group(bench, "step", 4, "ablation").figures(rung, timed).get("gain") for rung in rungs]
    assert gains == [None, *(2.0 + i for i in range(len(without.PARTS) - 1))], "all but dependent launch"


def test_without_the_graph_it_is_launched():
    state = ladder.weights(ARCH)
    runner = ladder.build(Rung("bf16", ours="fused", graph=True, off="graph"), ARCH, state, CPU, 2)
    assert isinstance(runner.step, FusedStep)


def test_the_fastest_of_ours_is_no_ablated_one(tmp_path):
    bench, _ = bench_of(tmp_path)
    runners = {rung.name: group.Runner(rung, (), (), None) for rung in (Rung(), Rung(ours="fused"))}
    cut = Rung(ours="fused", off="merge")
    runners[cut.name] = group.Runner(cut, (), (), None)
    timed = Timed({"example": [9.0] * 4, "fused": [2.0] * 4, cut.name: [1.0] * 4})
    facts = {name: {"peak_memory_bytes": None} for name in runners}
    assert Group(bench, "peers", 2, "eager").summarise(runners, facts, timed) == ["fused", "example"]
    assert bench.summary["b2"]["ours"] == "fused" and bench.summary["b2"]["best_peer_noisy"] is False


def test_sampling_of_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(sampling.BATCHES, "cpu", (3,))
    bench, rows = bench_of(tmp_path)
    sampling.sampling(bench, 1.0)
    assert [row["ok"] for row in rows] == [True] * 3 and bench.summary["sampling_images_per_s"] > 0
    assert rows[2]["over_example"] > 0 and rows[2]["over_library"] > 0

    class Spoilt(sampling.Sampler):
        def __init__(self, generator, precision):
            generator.main[0].weight.data *= 1.5
            super().__init__(generator, precision)

    monkeypatch.setattr(sampling, "Sampler", Spoilt)
    bench, rows = bench_of(tmp_path / "..")
    sampling.sampling(bench, 1.0)
    found = {row["ours"]: row for row in rows}
    assert len(rows) == 3 and found["fused"]["ok"] is False
    assert "differ by" in found["fused"]["why"] and "p50_ms" not in found["fused"]
    assert found[""]["ok"] and "sampling_images_per_s" not in bench.summary


def test_the_tutorials_run_is_a_run_of_the_product(tmp_path, monkeypatch):
    bench, rows = bench_of(tmp_path)
    monkeypatch.setattr(tutorial, "launch", lambda arguments, seconds: (runs.run(*arguments), ""))  # in this process
    with arithmetic("ieee"):  # a run sets PyTorch's switches for its process
        tutorial.tutorial(bench, 120.0, count=11, batch=4, epochs=2)
    (row,) = rows
    assert row["ok"] and row["steps"] == 2 * 3 and row["pictures"] == "random bytes"
    assert row["images_per_s_overall"] == pytest.approx(22 / row["train_seconds"])
    assert row["process_seconds"] > row["train_seconds"] > 0 and row["images_per_s_median"] > 0


def test_a_run_that_fails_says_so_and_one_without_time_is_not_begun(tmp_path, monkeypatch):
    bench, rows = bench_of(tmp_path)
    monkeypatch.setattr(tutorial, "launch", lambda arguments, seconds: (3, "it diverged"))
    tutorial.tutorial(bench, 1.0, count=4, batch=2)
    bench.plan = replace(PLAN, device=torch.device("cuda"))
    tutorial.tutorial(bench, 1.0, count=4, batch=2)
    assert [(row["ok"], row["why"]) for row in rows] == [
        (False, "few: exit code 3: it diverged"), (None, "about 60 s are needed, 1 are there"),
    ]  # fmt: skip


def test_folding_batch_norm_would_be_noticed():
    """Its statistics are those of trained maps, neither 0 nor 1, so that leaving them out is wrong."""
    norm = sampling.trained(ARCH, CPU).main[1]
    assert norm.running_mean.abs().max() > 1e-3 and (norm.running_var - 1).abs().min() > 1e-2


def test_the_shares_of_the_workers_are_all_kernels_of_the_steps_once():
    ours = (Rung(name, ours="fused", off=off) for name, off in (("bf16", ""), ("fp32", ""), ("bf16", "merge")))
    jobs = tuple((ARCH, 4, rung) for rung in ours)
    alone = {ahead.specialised(launch) for job in jobs for launch in ahead.step_launches(job)}
    shares = [[ahead.specialised(launch) for launch in ahead.share(jobs, None, k, 3)] for k in range(3)]
    assert sorted(map(str, sum(shares, []))) == sorted(map(str, alone)) and min(map(len, shares)) > 3
    merged, apart = ({s[0] for s in map(ahead.specialised, ahead.step_launches(job))} for job in (jobs[0], jobs[2]))
    assert apart - merged == {"merge_statistics_kernel", "merge_sums_kernel"}


def test_without_a_gpu_nothing_is_compiled_ahead(tmp_path, monkeypatch):
    bench, rows = bench_of(tmp_path)
    monkeypatch.setattr(ahead.precompile, "Compiler", None)
    ahead.compile_steps(bench, "step", [(ARCH, 4, Rung("bf16", ours="fused"))])
    assert rows == []


def test_what_a_gpu_cannot_do_is_missing_and_the_other_ceilings_stay(tmp_path, monkeypatch):
    """On a CPU that is told to be a GPU: graphs run their calls one by one, and there is no dependent launch."""
    of_a_gpu = ceilings.of_a_gpu

    def some(*operands):
        made = of_a_gpu(*operands)

        def fails():
            raise RuntimeError("no such launch\nat all")

        gaps = {"nodes": lambda: None, "launches": lambda: None}
        return made | {"between kernels": lambda: gaps, "dependent launch": fails}

    monkeypatch.setattr(ceilings, "graphed", lambda call, repeated=1: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ceilings, "of_a_gpu", some)
    monkeypatch.setattr(ceilings, "is_gpu", lambda device: True)
    bench, rows = bench_of(tmp_path)
    stages.measure_ceilings(bench, 1.0)
    found = {row["name"]: row for row in rows}
    assert (
        found["dependent launch"]["ok"] is None and found["dependent launch"]["why"] == "RuntimeError: no such launch"
    )
    assert found["matrix product fp8"]["matrix_tflops"] > 0 and found["copy within L2"]["l2_tbps"] > 0
    assert found["between kernels"]["node_us"] >= 0 and "dependent_node_us" not in found["between kernels"]
    assert bench.measured.of("bf16").tflops > 0 and " µs" in line(found["between kernels"])


def test_the_fp8_product_is_a_product():
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    error = (ceilings.fp8_product(a, b)().float() - a @ b).norm() / (a @ b).norm()
    assert error < 0.1


@pytest.mark.parametrize("dependent", [False, True])
def test_the_kernel_between_kernels_compiles_for_hopper(dependent):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.gaps import touch_kernel

    types = {"x": "*fp32", "BLOCK": "constexpr", "DEPENDENT": "constexpr"}
    source = ASTSource(touch_kernel, signature=types, constexprs={"BLOCK": 1024, "DEPENDENT": dependent})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": dependent}).asm["ptx"]
    assert ("griddepcontrol.wait" in ptx) == ("griddepcontrol.launch_dependents" in ptx) == dependent


def test_half_a_line_of_parity_is_left_out():
    whole = json.dumps({"name": "a", "ok": True})
    assert stages.whole_rows(whole + "\n" + whole[:9]) == [{"name": "a", "ok": True}]
