"""Records: what was measured, on what, from which sources. Append-only, one folder each.

`bench/results/<machine>/<date>_<slug>/` holds `rows.jsonl` (a line per measurement: at least `suite`, `name`, `ok`, and
figures with their units in their names), `env.json`, `README.md`, and `summary.json` where the step was measured.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
KERNEL_SOURCES = (
    "kernels/**/*.py",
    "csrc/**/*.c*",
    "csrc/**/*.h",
    "dcgan/*stacks.py",
    "dcgan/weights.py",
    "dcgan/fused.py",
    "dcgan/loop.py",
    "dcgan/step.py",
)
TRITON_SOURCES = ("kernels/_triton/*.py",)
"""What a tuned tile was measured from."""


def kernels_hash(root: Path = ROOT, sources: tuple[str, ...] = KERNEL_SOURCES) -> str:
    """sha256 over the sources that a speed depends on: names and contents, in order."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in sources for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\0{len(content := path.read_bytes())}\0".encode() + content)
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """The CPU's model as the kernel tells it. On x86 also its family and model numbers, as a virtual machine's name for
    it may not tell one generation from the next."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in reversed(lines))  # reversed: the first processor's stand last
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name += f", family {facts['cpu family']} model {facts['model']}"
    return name


def environment(commit: str | None = None) -> dict:
    """Where and from what a measurement comes.

    Args:
        commit: for a copy of the tree without git data; None: git is asked.
    """
    changes = _git("status", "--porcelain")
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    environment = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": bool(changes) if changes is not None else None,
        "kernels_hash": kernels_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_bf16": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    try:
        import triton

        environment["triton"] = triton.__version__
    except ImportError:
        environment["triton"] = None
    return environment


def machine() -> str:
    """The folder name of this machine: its GPU, or its CPU and the cores in use."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(folder: Path, rows: list[dict], readme: str, commit: str | None = None, summary: dict | None = None) -> Path:
    """Write a record into `folder`, which must not hold one already."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "rows.jsonl").exists():
        raise FileExistsError(f"{folder} already holds a record: records are append-only, take another folder")
    (folder / "env.json").write_text(json.dumps(environment(commit), indent=1) + "\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(readme)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return folder
