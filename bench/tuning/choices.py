"""What a table says beside tiles: the recipe of each public op, who applies the batch norm of a layer's input, how the
kernels of a step are launched."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.subjects import layers, whole
from bench.subjects.problems import Read, step_reads
from bench.tuning.search import Table
from dcgan.arch import Arch
from kernels import dispatch, tuning

MARGIN = 0.02
"""What is not done unasked must be faster by this fraction to be chosen: for an op a recipe of ours, since no layer may
be slower fused; for an input the load, since a map that was applied once serves whatever reads it. Dependent launch,
which the whole step shares, by any."""


@dataclass(frozen=True)
class Entry:
    """One choice of the table's `ops`: a public op on a layer (`any` for one without), and what it is decided by.

    precisions: the keys it goes to: what computes in float32 whatever the maps are has two, with TF32 and without.
    """

    op: str
    key: str
    precisions: tuple[str, ...]
    images: int
    works: tuple[layers.Op | whole.Whole, ...]

    @property
    def name(self) -> str:
        return f"{self.op}/{self.key}/{self.precisions[0]}/b{self.images}"


def entries(arch: Arch, batches: list[int], precision: str) -> list[Entry]:
    """Every public op of the steps of these batches: forward and backward decide together."""
    found = []
    for batch in batches:
        works = list(layers.step_ops(arch, batch, precision))
        for pair in zip(works[::2], works[1::2], strict=True):
            key = dispatch.layer_key(pair[0].layer)
            found.append(Entry(pair[0].op, key, (precision,), pair[0].images, pair))
        for work in whole.step_wholes(arch, batch, precision):
            precisions = (precision,) if work.op == "gather_images" else ("fp32", "tf32")
            found.append(Entry(work.op, "any", precisions, work.count, (work,)))
    return list({entry.name: entry for entry in found}.values())


def reads(arch: Arch, batches: list[int], precision: str) -> list[Read]:
    """Every input with a batch norm of the steps of these batches."""
    return list({read.name: read for batch in batches for read in step_reads(arch, batch, precision)}.values())


def best(times: Mapping[str, float], unasked: str = "eager", margin: float = MARGIN) -> str | None:
    """The fastest; `unasked` where it loses by no more than the margin. None of none."""
    if not times:
        return None
    fastest = min(times, key=lambda recipe: times[recipe])
    return unasked if times.get(unasked, float("inf")) <= times[fastest] * (1 + margin) else fastest


@contextmanager
def in_use(table: Table) -> Iterator[None]:
    """Let the launchers look tiles up in `table`, wherever its file is."""
    before = tuning.FOLDER
    with TemporaryDirectory() as folder:
        if table.path.exists():
            Path(folder, f"{tuning.slug(table.header['device'])}.json").write_bytes(table.path.read_bytes())
        tuning.FOLDER = Path(folder)
        tuning.forget()
        try:
            yield
        finally:
            tuning.FOLDER = before
            tuning.forget()
