"""`python -m bench.sanitize`: what it runs, how it reads the tools, and its cases, as far as they go without a GPU."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import sanitize
from bench.sanitize import FOUND_CODE, Job, Verdict, findings, judge, summary
from bench.sanitizer import cases as catalogue
from kernels._cuda import conv, launch

HEADERS = sorted((sanitize.ROOT / "csrc").glob("*.h"))
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
STRAY = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at write_past+0x80 in bugs.py:12
=========     by thread (96,0,0) in block (0,0,0)
=========     Address 0x7f2c00000180 is out of bounds
========= Invalid __global__ write of size 4 bytes
=========     by thread (97,0,0) in block (0,0,0)
========= ERROR SUMMARY: 32 errors
"""
UNWRITTEN = """\
========= Uninitialized __global__ memory read of size 16 bytes
=========     at apply_kernel+0x40
========= ERROR SUMMARY: 1 error
"""
RACE = """\
========= Error: Race reported between Write access at race+0x90 and Read access at race+0xb0 [128 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
BARRIER = """\
========= Barrier error detected. Divergent thread(s) in warp.
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    "text, count, first",
    [
        (CLEAN, 0, None),
        (STRAY, 32, "Invalid __global__ write of size 4 bytes"),
        (UNWRITTEN, 1, "Uninitialized __global__ memory read of size 16 bytes"),
        (RACE, 1, "Race reported between Write access"),
        (BARRIER, 1, "Barrier error detected. Divergent thread(s) in warp."),
        ("========= Internal Sanitizer Error\n", None, None),
        ("", None, None),
    ],
)
def test_what_a_tool_says_is_read(text, count, first):
    assert summary(text) == count
    assert findings(text)[0].startswith(first) if first else not findings(text)


def test_verdicts():
    case = Job("memcheck", "triton/head")
    assert judge(case, 0, CLEAN) == Verdict(True, None)
    wrong = judge(case, FOUND_CODE, STRAY)
    assert wrong.ok is False and wrong.why == "32 found: Invalid __global__ write of size 4 bytes"
    assert judge(case, 1, "ValueError: y has shape (3,)\n" + CLEAN).ok is False  # the case itself broke
    assert judge(case, 0, "no devices\n") == Verdict(None, "the tool did not finish (exit code 0): no devices")
    assert judge(Job("racecheck", "cuda/adam"), FOUND_CODE, RACE).ok is False


@pytest.mark.parametrize("tool, text", [("memcheck", STRAY), ("initcheck", UNWRITTEN), ("racecheck", RACE)])
def test_a_planted_bug_must_be_found(tool, text):
    job = Job(tool, "planted")
    assert judge(job, FOUND_CODE, text) == Verdict(True, None)
    missed = judge(job, 0, CLEAN)
    assert missed.ok is False and "did not find the bug" in missed.why
    other = BARRIER  # something else found is not the bug that was planted
    assert judge(job, FOUND_CODE, other).ok is False


def test_jobs_start_with_the_proof_that_a_tool_works():
    all_jobs = sanitize.jobs()
    assert next(job.case for job in all_jobs if job.tool == "memcheck") == "planted"
    assert {job.tool for job in all_jobs if job.case == "planted"} == set(sanitize.PLANTED)
    assert len({job.name for job in all_jobs}) == len(all_jobs)
    assert Job("synccheck", "cuda/gemms") in all_jobs and Job("memcheck", "triton/prologues") in all_jobs
    assert not {Job("memcheck", f"cuda/{name}") for name in ("gather", "prologues")} & set(all_jobs)
    assert not [job for job in sanitize.jobs(extension=False) if job.case.startswith("cuda")]
    assert [job.case for job in sanitize.jobs(("racecheck",), "triton/head")] == ["planted", "triton/head"]


def on_a_gpu(monkeypatch, verdict):
    """A GPU and a tool that say `verdict` of each job, in a second of a clock that nothing else moves."""
    clock, ran = SimpleNamespace(now=0.0), []

    def run_job(tool_path, job, seconds):
        clock.now += 1
        ran.append((job, seconds))
        return verdict(job)

    monkeypatch.setattr(sanitize, "missing", lambda: None)
    monkeypatch.setattr(sanitize, "find_tool", lambda: "/bin/compute-sanitizer")
    monkeypatch.setattr(sanitize._cuda, "available", lambda: None)
    monkeypatch.setattr(sanitize, "run_job", run_job)
    monkeypatch.setattr(sanitize.time, "monotonic", lambda: clock.now)
    return ran


def collect(seconds, **options):
    rows = []

    def emit(suite, name, ok, why=None, **figures):
        rows.append({"suite": suite, "name": name, "ok": ok, "why": why, **figures})

    sanitize.sanitize(seconds, emit, **options)
    return rows


def test_what_there_is_no_time_for_is_named(monkeypatch):
    ran = on_a_gpu(monkeypatch, lambda job: Verdict(True, None))
    rows = collect(3, tools=("memcheck",))
    assert len(ran) == 3 and [row["ok"] for row in rows[:3]] == [True] * 3
    assert all(row["ok"] is None and row["why"] == "no time left of 3 s" for row in rows[3:])
    assert len(rows) == len(sanitize.jobs(("memcheck",))) and ran[0][1] == 30
    assert rows[0] == {"suite": "sanitize", "name": "planted under memcheck", "ok": True, "why": None,
                       "tool": "memcheck", "seconds": 1.0}  # fmt: skip
    assert max(seconds for _, seconds in ran) <= sanitize.CASE_SECONDS


def test_without_the_extension_its_cases_are_left_and_that_is_said(monkeypatch):
    ran = on_a_gpu(monkeypatch, lambda job: Verdict(True, None))
    monkeypatch.setattr(sanitize._cuda, "available", lambda: "the extension kernels._C is not built")
    rows = collect(1000)
    assert rows[0]["ok"] is None and "not built" in rows[0]["why"]
    assert ran and not [job for job, _ in ran if job.case.startswith("cuda")]


def test_without_a_gpu_one_row_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = collect(10)
    assert len(rows) == 1 and rows[0]["ok"] is None and "needs a GPU" in rows[0]["why"]


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sanitize", *arguments])
    code = sanitize.run_command(sanitize.main)
    return code, capsys.readouterr()


def test_exit_codes(monkeypatch, capsys):
    on_a_gpu(monkeypatch, lambda job: Verdict(True, None))
    assert command(monkeypatch, capsys, "--tool", "memcheck", "--minutes", "9")[0] == 0
    on_a_gpu(monkeypatch, lambda job: Verdict(job.case != "cuda/adam", "1 found"))
    code, printed = command(monkeypatch, capsys)
    assert (
        code == 3 and "cuda/adam under racecheck" in printed.err and "WRONG   cuda/adam under memcheck" in printed.out
    )
    on_a_gpu(monkeypatch, lambda job: Verdict(None, "not finished"))
    assert command(monkeypatch, capsys)[0] == 2
    on_a_gpu(monkeypatch, lambda job: Verdict(True if job.case == "planted" else None, None))
    assert command(monkeypatch, capsys)[0] == 2, "a tool that works and no case that ran show nothing"
    assert command(monkeypatch, capsys, "--only", "planted")[0] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--only", "("), "--only (: not a regular expression"),
        (("--minutes", "0"), "--minutes 0: it must be positive"),
        (("--tool", "leakcheck"), "invalid choice: 'leakcheck'"),
        (
            ("--run", "triton/none"),
            "--run triton/none: accepted are planted/memcheck, planted/initcheck, planted/racecheck, triton/gemms",
        ),
        (("--run", "cuda/prologues"), "--run cuda/prologues: accepted are planted/memcheck"),
        (("--only", "gemm5"), "--only gemm5: no case has such a name; there are planted, triton/gemms, cuda/gemms"),
        ((), "compute-sanitizer needs a GPU"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, printed = command(monkeypatch, capsys, *arguments)
    assert code == 2 and message in printed.err and printed.err.count("\n") == 1


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path=None: None)
    assert "compute-sanitizer was not found" in sanitize.missing()


def test_a_job_runs_under_the_tool(tmp_path):
    """With a stand-in for the tool: its arguments, its environment, a hang."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\necho "========= ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    assert sanitize.run_job(str(tool), Job("memcheck", "triton/head"), 20) == Verdict(True, None)
    said = subprocess.run(
        sanitize.command(str(tool), Job("racecheck", "planted")), capture_output=True, text=True
    ).stdout
    assert "--tool racecheck" in said and "--racecheck-report all" in said and "--run planted/racecheck" in said
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    assert sanitize.run_job(str(tool), Job("memcheck", "triton/head"), 0.2) == Verdict(None, "not finished after 0 s")


CASES = """
import sys
import torch
from bench.sanitizer import cases as catalogue
from kernels._triton import launch
launched = set()
run = launch.Launch.run
launch.Launch.run = lambda self: (launched.add(named(self)), run(self))
def named(self):
    state = self.arguments.get("x_state")
    return self.kernel.fn.__name__ + ("" if state is None else "+" + self.arguments.get("SIDE", "x"))
torch.bfloat16 = torch.float16  # the interpreter has no bfloat16 products
for case in sys.argv[1:]:
    catalogue.run("triton", case, torch.device("cpu"))
print(*sorted(launched))
"""
NORMS = (
    "statistics_kernel merge_statistics_kernel apply_kernel activation_grad_kernel merge_sums_kernel apply_grad_kernel"
)
OTHERS = "head_kernel head_grad_kernel gan_loss_kernel overflow_kernel adam_kernel gather_kernel"
PRODUCTS = "conv_kernel conv_transpose_kernel conv_transpose_image_kernel wgrad_kernel sum_shares_kernel"


LOADS = "conv_kernel+x conv_transpose_kernel+x conv_transpose_image_kernel+x wgrad_kernel+low wgrad_kernel+high"


@pytest.mark.parametrize(
    "cases, kernels",
    [
        pytest.param("batch_norm head adam gather prologues", f"{NORMS} {OTHERS} {LOADS}", id="the rest"),
        pytest.param("gemms images", PRODUCTS, id="products", marks=pytest.mark.long),
    ],
)
def test_cases_launch_every_kernel(cases, kernels):
    """Triton's, in its interpreter."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CASES, *cases.split()]
    done = subprocess.run(command, cwd=sanitize.ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(kernels.split()) <= set(done.stdout.split()), done.stdout


@pytest.mark.parametrize(
    "case, ops",
    [
        ("images", "image_conv image_conv_transpose image_wgrad sum_shares"),
        ("batch_norm", "bn_statistics bn_merge_statistics bn_apply bn_activation_grad bn_merge_sums bn_apply_grad"),
        ("head", "head head_grad gan_loss"),
        ("adam", "adam"),
        ("gemms", "conv_sm80 conv_sm90 wgrad_sm90"),
    ],
)
def test_cases_call_every_op_of_the_extension(case, ops, monkeypatch):
    """With the ops counted and not run: an op fills tensors that it is given."""
    called = set()
    monkeypatch.setattr(launch, "launch", lambda op, *arguments: called.add(op))
    for source in conv.SMS:  # as on either kind of GPU
        monkeypatch.setattr(conv, "source", lambda tensor, source=source: source)
        catalogue.run("cuda", case, torch.device("cpu"))
    assert set(ops.split()) <= called


def test_those_are_all_the_ops():
    declared = re.findall(r"^cudaError_t (\w+)\(\s*Stream stream", "".join(path.read_text() for path in HEADERS), re.M)
    tested = next(mark for mark in test_cases_call_every_op_of_the_extension.pytestmark).args[1]
    assert set(declared) == {op for _, ops in tested for op in ops.split()}
