"""The CUDA extension kernels._C: loaded here and nowhere else, its launchers each in the file of their family.

Launchers have the names, layouts and results of those in `kernels._triton`. The extension is a library of ops in
`torch.ops.dcgan_cuda` and no Python module; setup.py builds it, or leaves the reason why not in kernels/_C.txt.

    conv        the k4 s2 products: RGB ends (image), and between maps on the tensor cores
    batch_norm  statistics, merges and applies, forward and backward
    head        a discriminator's last layer with loss and both gradients
    adam        every parameter in one launch, and its 16-bit copy
    shares      those of a weight gradient, added up
    launch      argument checks, and the way into the ops; epilogue, those of the products
"""

import functools
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent.parent / "_C.abi3.so"
OPS = "dcgan_cuda"
HOW = "`DCGAN_BUILD_CUDA=1 pip install --no-build-isolation -e .` builds it, and needs nvcc"


def load(path: Path) -> str | None:
    """Load the extension and register its ops' fake kernels; why it failed, or None.

    An op fills tensors that it is given and returns nothing, so there is nothing for a fake kernel to make.
    """
    if not path.exists():
        note = path.with_name("_C.txt")
        said = note.read_text(encoding="utf-8", errors="replace") if note.exists() else ""
        reason = next(iter(said.splitlines()), HOW)  # what follows is the compiler's log
        return f"the extension kernels._C is not built: {reason}"
    try:
        if _is_cut_short(path):
            raise OSError(f"{path}: the file is cut short")
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the extension kernels._C does not load: {error.__cause__ or error}"
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith(f"{OPS}::"):
            torch.library.register_fake(schema.name, lambda *args: None)
    return None


def _is_cut_short(path: Path) -> bool:
    """Whether a library ends before the table of its sections, the last thing in an ELF file.

    A copy that a full disk ended is such a one; to load it would end the process, by SIGBUS.
    """
    with path.open("rb") as file:
        head = file.read(64)
    fields = (40, 48), (58, 60), (60, 62)  # e_shoff, e_shentsize and e_shnum of ELF's 64-bit header
    table, entry, entries = (int.from_bytes(head[start:end], "little") for start, end in fields)
    return head.startswith(b"\x7fELF") and path.stat().st_size < table + entry * entries


_MISSING = load(LIBRARY)
if _MISSING and LIBRARY.exists():
    warnings.warn(f"{_MISSING}; the other backends work", RuntimeWarning, stacklevel=2)


def available() -> str | None:
    """Why the extension cannot be used, whatever the device; None if it can."""
    return _MISSING


@functools.cache
def _fails_on(index: int) -> str | None:
    """Why a launch of the smallest kernel fails on a device; None if it does not."""
    from kernels._cuda.batch_norm import merge_sums
    from kernels.geometry import Partials

    try:
        merge_sums(Partials(torch.zeros((2, 1, 1, 1), device=f"cuda:{index}"), None), 1)
    except RuntimeError as error:  # no machine code for this GPU
        return f"the extension does not run on {torch.cuda.get_device_name(index)}: {error}"
    return None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the extension's kernels cannot run on tensors of this device and type; None if they can."""
    if _MISSING:
        return _MISSING
    if device.type != "cuda":
        return f"the extension's kernels need a CUDA device; the tensor is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        return f"the extension's kernels take bfloat16, float16 and float32; the tensor is {name}"
    return _fails_on(torch.cuda.current_device() if device.index is None else device.index)
