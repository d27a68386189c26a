"""Parity: the error bar tells right from wrong, every planned check is sound without a GPU, a cut run goes on."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cuda_host import on_host

import kernels
from bench import ops, parity, record
from bench.parity import Rows
from bench.subjects import claims, contracts, gemms, layers
from bench.subjects.accuracy import Answers, Noise, Subject, excess, verify, walk
from bench.subjects.problems import Problem, Use
from bench.tuning.search import Journal
from dcgan.arch import PRESETS, Arch
from dcgan.errors import run_command
from kernels import reference, tuning
from kernels.geometry import CudaConfig, Deferred, raw

CPU = torch.device("cpu")
PATHS = ("tma", "pointers")
SMALL = Arch(image_size=16, nz=3, ngf=4, ndf=4)
SCOPE = claims.Scope(SMALL, CPU, (2,), ("fp32", "bf16"), 2, {})


# The bar


def test_the_bar_is_twice_the_twin_s_error_and_two_units():
    exact = torch.ones(4, dtype=torch.float64)
    twin = exact.float() + 1e-3
    assert excess(exact.float() + 2e-3, twin, exact) == pytest.approx(1.0, rel=1e-2)
    assert excess(exact.float() + 4e-3, twin, exact) > 1.9
    eps = torch.finfo(torch.float32).eps
    assert excess(exact.float() + 2 * eps, exact.float(), exact) <= 1 < excess(exact.float() + 4 * eps, exact, exact)
    assert excess(exact.float() + 4 * eps, exact, exact, slack=8 * eps) < 1
    assert excess(exact.float(), exact, exact, slack=0.0) == 0
    assert walk(64, torch.float32, 1.0) == walk(1, torch.float32, 1.0) < walk(6400, torch.float32, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_infinity_and_wrong_shapes_are_wrong(bad):
    exact = torch.ones(4, dtype=torch.float64)
    ours = exact.float().clone()
    ours[2] = bad
    assert excess(ours, exact.float(), exact) == float("inf")
    assert excess(exact.float()[:3], exact.float(), exact) == float("inf")


def test_an_output_that_is_missing_is_wrong():
    right = {"y": torch.ones(2).double(), "dx": torch.ones(2).double()}
    subject = Subject({"r": lambda: {"y": torch.ones(2)}}, lambda: Answers(right, right), "fp32")
    assert verify(subject, "r") == (float("inf"), "no dx")


# Planted bugs are found, in each kind of work


def worst(work, recipe):
    return verify(ops.build(work, CPU), recipe)


def broken_derivative(a, activation, slope=0.2):
    return RIGHT_DERIVATIVE(a, activation, slope + 0.02)


RIGHT_DERIVATIVE = reference.derivative


def one(kind, direction, batch_norm=True):
    return next(
        op for op in layers.step_ops(SMALL, 4, "fp32")
        if op.layer.kind == kind and op.direction == direction and op.layer.batch_norm == batch_norm
        and op.layer.stride == 2
    )  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_an_op_that_forgets_a_column_is_wrong(monkeypatch, kind, direction):
    op = one(kind, direction)
    assert worst(op, "eager")[1] is None
    name = op.op
    right = getattr(kernels, name)

    def forgetful(x, *arguments, **options):
        mask = torch.ones_like(x)
        mask[..., -1] = 0
        return right(x * mask, *arguments, **options)

    monkeypatch.setattr(kernels, name, forgetful)
    assert worst(op, "eager")[1]


def test_groups_that_share_their_statistics_are_wrong(monkeypatch):
    op, right = one("conv", "forward"), kernels.conv_bn_act
    assert op.groups == 2
    monkeypatch.setattr(kernels, "conv_bn_act", lambda *a, groups, **options: right(*a, groups=1, **options))
    assert "y" in worst(op, "eager")[1]


@pytest.mark.parametrize("kernel", ["conv", "conv_transpose", "wgrad"])
def test_a_load_that_forgets_the_batch_norm_or_the_padding_is_wrong(monkeypatch, kernel):
    """Padding that is normed and activated: as if the picture went on with zeros before the batch norm. And none."""
    use = claims.deferred_uses(Problem(kernel, 16, 16, 4, 4), 2)[-1]
    subject = gemms.build(Problem(kernel, 16, 16, 4, 4, "bf16", use=use), CPU)
    assert verify(subject, "library")[1] is None

    def padded(p, o):
        ends = {"first": o.first, "second": o.second}
        name = next(name for name, t in ends.items() if isinstance(t, Deferred))
        y, state, *rest = ends[name]
        wide = reference.apply(F.pad(y, (0, 0, 1, 1, 1, 1)), state, *rest)  # its rim is what padding would become
        ends[name] = wide
        if p.kernel == "conv":
            y = F.conv2d(gemms.nchw(wide), gemms.nchw(o.second), stride=2)
        elif p.kernel == "conv_transpose":
            y = F.conv_transpose2d(gemms.nchw(wide), gemms.nchw(o.second), stride=2, padding=3)
        else:
            high, low = gemms.nchw(wide).float(), gemms.nchw(o.first).float()
            return gemms.nhwc(torch.nn.grad.conv2d_weight(high, (p.into, p.out, 4, 4), low, stride=2)).contiguous()
        return reference.finish(gemms.nhwc(y).contiguous(), o.epilogue)

    for wrong in (padded, lambda p, o: gemms.plain(p, bare(o))):
        subject.runs["wrong"] = partial(gemms.outputs, *subject.runs["library"].args[:2], wrong)
        assert verify(subject, "wrong")[1], wrong


def bare(o):
    """Operands whose batch norm is forgotten."""
    return replace(o, **{k: raw(getattr(o, k)) for k in ("first", "second")})


def test_an_adam_that_is_one_step_late_is_wrong(monkeypatch):
    work = next(w for w in ops.whole.step_wholes(SMALL, 4, "bf16") if w.op == "adam_step")
    assert worst(work, "eager")[1] is None
    right = kernels.adam_step

    def late(*lists, **options):
        lists[-1].sub_(1)
        right(*lists, **options)
        lists[-1].add_(1)

    monkeypatch.setattr(kernels, "adam_step", late)
    assert "p0" in worst(work, "eager")[1]


def test_a_slope_that_is_off_by_a_tenth_is_wrong(monkeypatch):
    work = next(
        e for e in ops.elementwise.step_elements(SMALL, 4, "bf16") if e.name("").startswith("activation_grad/D")
    )
    subject = ops.build(work, CPU)
    assert verify(subject, "eager")[1] is None
    monkeypatch.setattr(reference, "derivative", broken_derivative)
    assert "g" in verify(subject, "eager")[1]


def test_bits_that_change_are_found():
    values = iter([1.0, 1.0, 1.0000001])
    subject = Subject({"r": lambda: {"y": torch.tensor([next(values)])}}, lambda: None, "fp32")
    assert contracts.repeats(subject, "r", 2) is None
    values = iter([1.0, 1.0, 1.0000001])
    assert contracts.repeats(subject, "r", 3) == "run 3 of 3 differs in y"


class EagerGraph:
    """A CUDA graph as far as a capture uses it: a replay runs the work again, into the tensors of the capture."""

    def __init__(self, work, results, spoil):
        self.work, self.results, self.spoil = work, results, spoil

    def replay(self):
        again = self.work()
        pairs = zip(again.values(), self.results.values(), strict=True) if isinstance(again, dict) else zip(
            again, self.results, strict=True
        )  # fmt: skip
        for new, old in pairs:
            old.detach().copy_(new * self.spoil if new.is_floating_point() else new)


@pytest.mark.parametrize("spoil", [1.0, 1.5])
def test_a_replay_that_differs_is_found(monkeypatch, spoil):
    """By a stand-in for CUDA graphs, since there is no GPU; the second replays something else."""

    def capture(work, device):
        results = work()
        return EagerGraph(work, results, spoil), results

    monkeypatch.setattr(contracts, "capture", capture)
    op = one("conv", "forward")
    wholes = {work.op: work for work in ops.whole.step_wholes(SMALL, 4, "fp32")}
    found = [contracts.captured(op, "eager", CPU)]
    found += [contracts.captured_whole(wholes[name], "eager", CPU) for name in ("gan_loss", "gather_images")]
    assert found == [None] * 3 if spoil == 1.0 else all("differs by" in why for why in found)


# The plan


def test_every_check_planned_for_a_gpu_can_be_made_and_compiled_from_here(monkeypatch):
    """Names are distinct, jobs travel to other processes, and each makes its launches on meta tensors."""
    pytest.importorskip("triton")
    from bench.tuning.lab import launches_of

    monkeypatch.setattr(claims, "recipes", lambda scope, work: ["triton", "eager"])
    monkeypatch.setattr(claims, "runnable", lambda recipes, *_: [recipe for recipe in recipes if recipe != "cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no such device")
    scope = claims.scope_of(torch.device("cuda"))
    planned = list(claims.checks(scope))
    names = [check.name for check in planned]
    assert len(set(names)) == len(names) > 2000
    assert {f"conv_bn_act/D3/backward/triton/bf16/{b}" for b in ("b256 g2", "b128")} <= set(names[:400])
    assert {f"conv_transpose_bn_act/G2/forward/triton/fp16/b{b}" for b in (1, 7, 128, 256, 1024)} <= set(names)
    sections = {"numbers", "opcheck", "compile", "graph", "epilogues", "prologues", "bits"}
    assert {check.section for check in planned} == sections
    deferred = {f"{p}/triton/bf16/b" for p in ("conv/D3/forward deferred", "wgrad/D4/wgrad deferred")}
    assert {f"{name}256 g2" for name in deferred} | {"conv/D3/forward deferred/triton/bf16/b128"} <= set(names)
    assert {f"conv_transpose/G5/forward{d}/triton/tf32/b1024" for d in ("", " deferred")} <= set(names)
    prologues = [name for name in names if "deferred" in name and "[" in name]
    for kernel in ("conv[", "conv_transpose[statistics", "conv_transpose[activation tanh", "wgrad["):
        mine = [name for name in prologues if name.startswith(kernel)]
        assert {name.split("/")[3] for name in mine} == set(scope.precisions), kernel
        assert all(any(f"{g}" in name and path in name for name in mine) for g in ("g1", "g2") for path in PATHS), (
            kernel
        )
    assert sum(name.startswith("bits of an apply: conv_transpose[") for name in names) >= 16
    jobs = list(dict.fromkeys(job for check in planned for job in check.jobs))
    assert pickle.loads(pickle.dumps(jobs)) == jobs and len(jobs) > 500
    onto_images = [job for job in jobs if job[1] and job[0].kernel == "conv_transpose" and job[0].out == 3]
    for work, config in (*jobs[:: len(jobs) // 60], *onto_images[::4]):
        assert launches_of(work, config, 90), work
    uses = {str(use) for use in claims.USES}
    assert len(uses) == 38 and "batch_norm_grad relu g2 merged" in uses and str(Use()) in uses
    for path in PATHS:
        assert any(f"batch_norm_grad leaky_relu g2 merged {path}" in name for name in names)


def test_every_tile_of_the_extension_is_checked(monkeypatch):
    """Planned as on a GPU; of each kernel the first and one of a cluster run here, on the model of one."""
    monkeypatch.setattr(claims, "runnable", lambda recipes, *_: list(recipes))
    scope = claims.Scope(PRESETS["dcgan64"].arch, CPU, (2,), ("bf16", "fp16", "fp32"), 2, {})
    planned = {check.name: check for check in claims.extension_tiles(scope, claims.Kept())}
    assert len(planned) == 2 * 2 * 8 * (5 + 5 + 1)
    with on_host():
        for name in ("conv[statistics g1 128x1]/128x192@8/cuda/bf16/b22",
                     "conv_transpose[batch_norm_grad leaky_relu g2 merged 64x2]/128x192@4/cuda/bf16/b22",
                     "wgrad[activation g1 64x4]/128x192@4/cuda/fp16/b22"):  # fmt: skip
            assert planned[name].run()[0] is None, name


def test_a_tuned_tile_of_the_extension_is_checked_too(monkeypatch):
    entry = tuning.Entry((64, 128, 32), 256, "cuda", CudaConfig(128, 2))
    monkeypatch.setattr(tuning, "load", lambda name: (tuning.Table({}, {("conv", "bf16"): (entry,)}, {}, {}), ""))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    scope = claims.Scope(PRESETS["dcgan64"].arch, torch.device("cuda"), (2,), ("bf16",), 2, {})
    planned = list(claims.tuned(scope, claims.Kept()))
    assert planned and all("/cuda/bf16/" in check.name and not check.jobs for check in planned)
    assert not any("tanh" in check.name or "deferred" in check.name for check in planned)


def test_the_interpreter_is_not_asked_for_bf16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert claims.scope_of(CPU).precisions == ("fp32", "fp16")
    with pytest.raises(Exception, match="bf16 products are wrong"):
        claims.scope_of(CPU, precisions=["bf16"])


# A run


def run(path, only="", seconds=60.0, scope=SCOPE):
    rows, journal = Rows(path), Journal(path.with_suffix(".journal"))
    missed = parity.run(scope, rows, journal, re.compile(only), seconds)
    return rows, missed


def test_a_run_writes_rows_and_goes_on_where_it_was_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows, missed = run(path, "^conv_act|gan_loss", 0.0)
    assert not rows.all and missed > 0
    rows.add(f"{missed} more", None, "not reached")
    rows, missed = run(path, "^conv_act")
    assert missed == 0 and all(row["ok"] for row in rows.all) and rows.all == Rows(path).all
    first = len(rows.all)
    assert {row["name"].split("/")[-2] for row in rows.all} == {"fp32", "bf16"}
    rows, _ = run(path, "^conv_act|^gan_loss")
    assert len(rows.all) > first and len(rows.names) == len(rows.all), "nothing twice"


def test_what_raises_and_what_ended_the_process_are_rows_that_failed(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    names = [check.name for check in claims.checks(SCOPE) if check.name.startswith("conv_act/D1")]
    Journal(path.with_suffix(".journal")).begin(names[1])
    right = kernels.conv_act

    def raises(*arguments, **options):
        if torch.is_grad_enabled():
            return right(*arguments, **options)
        raise RuntimeError("CUDA is on fire\nat line 2")

    monkeypatch.setattr(kernels, "conv_act", raises)
    rows, _ = run(path, "^conv_act/D1/.*fp32")
    found = {row["name"]: row for row in rows.all}
    assert found[names[0]]["why"] == "RuntimeError: CUDA is on fire" and found[names[0]]["ok"] is False
    assert found[names[1]]["why"] == "it ended the process"


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.parity", *map(str, arguments)])
    code = run_command(parity.command)
    return code, capsys.readouterr()


def test_the_command_says_how_many_and_exits_3_for_a_wrong_one(tmp_path, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, "--only", "^gather_images.*b3$", "--precision", "fp32")
    assert code == 0 and re.search(r"[1-9]\d* right, 0 wrong", said.out)
    right = kernels.gather_images
    monkeypatch.setattr(kernels, "gather_images", lambda *a, **options: right(*a, **options) * 1.01)
    code, said = command(monkeypatch, capsys, "--only", "^gather_images.*b3$", "--precision", "fp32")
    assert code == 3 and "gather_images/D1/step/eager/fp32/b3" in said.err
    assert command(monkeypatch, capsys, "--minutes", "0")[0] == 2
    assert command(monkeypatch, capsys, "--only", "(")[0] == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"name": "conv_act/D1", "ok": true}\n')
    code, said = command(monkeypatch, capsys, "--only", "nothing of the kind", "--rows", rows)
    assert code == 2 and "no row has such a name" in said.err, "whatever an earlier run left in the file"


def test_registration_and_compilation_are_checked_here_too(tmp_path):
    rows, _ = run(tmp_path / "rows.jsonl", "^(opcheck|compile)/conv_bn_act|^opcheck/adam")
    assert len(rows.all) == 3 and all(row["ok"] for row in rows.all), rows.all


def test_triton_s_kernels_in_the_interpreter(tmp_path):
    """In a process of its own, as the suite does it: products on both load paths, an op, an elementwise kernel."""
    pytest.importorskip("triton")
    path = tmp_path / "rows.jsonl"
    only = r"^(conv_bn_act/D2/forward|apply/D2/forward|conv\[statistics g2 merged \w+\]/16x32@8)/triton/fp32"
    command = [sys.executable, "-m", "bench.parity", "--rows", str(path), "--only", only, "--minutes", "2"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=record.ROOT, env=environment, check=True, capture_output=True, timeout=240)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["name"].split("/")[0] for row in rows} == {
        "conv_bn_act", "apply", "conv[statistics g2 merged tma]", "conv[statistics g2 merged pointers]",
    }  # fmt: skip
    assert all(row["ok"] for row in rows), rows


def test_noise_is_the_same_every_time():
    assert torch.equal(Noise(CPU, "bf16")(4, 4), Noise(CPU, "bf16")(4, 4))
    assert Noise(CPU, "fp16")(2).dtype == torch.float16 and Noise(CPU, "fp16").single(2).dtype == torch.float32


def test_a_row_cut_off_as_it_was_written_is_run_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a", "ok": true}\n{"name": "b", "o', encoding="utf-8")
    rows = parity.Rows(path)
    assert rows.names == {"a"} and path.read_text(encoding="utf-8") == '{"name": "a", "ok": true}\n'
