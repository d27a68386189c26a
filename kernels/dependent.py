"""Dependent launch: kernels that may begin before the one before them in the stream has ended.

From compute capability 9.0 on, a launch can be told not to wait for the end of the kernel before it ("programmatic
dependent launch"; CUDA programming guide): it may begin once every block of that kernel has said so, or ended. It waits
by itself, at `griddepcontrol.wait`, until that kernel has ended and all that it wrote can be seen (PTX ISA). What is
saved is what lies between two kernels: the new one's launch, the set-up of its blocks, and the SMs that stand idle
while the last blocks of the old one end. A CUDA graph keeps these edges.

Every kernel here keeps three rules, which make any sequence of them as safe as launches one after the other:

1. It neither reads nor writes memory that others see before it has waited: not even its weights, which the launch
   before may be Adam's. Tests run the kernels over inputs that are not there until then.
2. Each of its blocks waits. So a kernel that has ended has seen the one before it end, and that one the one before: a
   kernel of a library, which is launched in the ordinary way and knows nothing of this, comes after all of them.
3. It lets the next one begin after it has waited, and at once. So never more than two kernels are under way.

The last rule is what a kernel pays: the next one's blocks take the room on an SM that its own have left, and stand
there waiting. Whether that gains anything depends on the device: the tuned table has the answer
(`kernels.tuning.dependent`), and without one nothing is launched so. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CAPABILITY = (9, 0)
"""First compute capability with programmatic dependent launch."""

_asked = False


def able(device: torch.device) -> bool:
    """Whether the device supports it."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def asked() -> bool:
    """Whether launches should currently be dependent."""
    return _asked


@contextmanager
def dependent_launches(ask: bool = True) -> Iterator[None]:
    """Within it, this process launches our kernels so, on whichever stream; the device must support it."""
    global _asked
    before, _asked = _asked, ask
    try:
        yield
    finally:
        _asked = before
