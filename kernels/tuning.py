"""The tuned table of a device: which recipe and tile measured fastest for a shape. Nothing is timed here.

`bench.tune` writes `kernels/tuned/<device>.json`:

    {"device": "NVIDIA H200", "record": "bench/results/…", "torch": …, "triton": …, "kernels_hash": …,
     "ops":   {"conv_bn_act": {"64x128@32": {"bf16": {"128": "triton", "1024": "library"}}}},
     "tiles": {"conv": {"64x128@32": {"bf16": {"256": {"recipe": "triton", "tile": {…}, "us": …}}}}},
     "inputs": {"conv": {"128x256@16": {"bf16": {"256": "applied"}}}},
     "launch": {"step": {"any": {"bf16": {"128": "dependent", "1024": "plain"}}}}}

"ops" has the public ops, by layer (IN x OUT @ IN_SIZE; `any` for an op without one), precision and images; "tiles" the
kernels conv, conv_transpose and wgrad, by their own channels and input size (wgrad: LOW x HIGH @ low size), with a tile
of Triton's or of the extension's where the recipe has one; "inputs" the layers whose input has a batch norm, `applied`
by a launch of its own or `deferred` to the loads of its readers: the forward pass and the weight gradient, or,
under `conv_forward`, only the forward pass; "launch" whether a captured step's kernels should be launched
`dependent` (`kernels.dependent`) or `plain`, by its images. A lookup takes the nearest measured shape: the layer itself
or one of at most `NEAR` times its channels and size, and of that the nearest number of images, at most `NEAR_IMAGES`
times as many or as few. A file that is not such a table, or is another device's, gets one warning and is not used.
"""

import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels._triton.config import FLAT_CHANNELS, IMAGE_CHANNELS, ConvConfig, WgradConfig, inner, tma_fits
from kernels.geometry import CudaConfig, Layer

FOLDER = Path(__file__).parent / "tuned"
RECIPES = ("triton", "cuda", "library", "eager")
INPUTS = ("applied", "deferred")
LAUNCHES = ("plain", "dependent")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
CONFIGS = {"conv": ConvConfig, "conv_transpose": ConvConfig, "wgrad": WgradConfig}
"""Classes of Triton's tiles; the extension's are `CudaConfig`, or None where it has only one kernel for a shape."""
Config = ConvConfig | WgradConfig | CudaConfig
NEAR = 2.0
NEAR_IMAGES = 4.0
MOST = {"warps": 32, "stages": 16, "split": 4096, "taps": 4}
MOST_OF_A_TILE = 1024
"""Upper bounds of a tile's fields, so that a corrupt tile is found here and not by a compiler; of all others it is
`MOST_OF_A_TILE`."""

Shape = tuple[int, ...]
"""Channels in, channels out, size; empty for an op without a layer."""


class Entry(NamedTuple):
    """One measured choice; `tile` is None if the recipe has none, and always for an op."""

    shape: Shape
    images: int
    recipe: str
    tile: Config | None = None

    def __str__(self) -> str:
        return self.of("images")

    def of(self, unit: str) -> str:
        """What was measured, with the unit of its `images`."""
        layer = f"{self.shape[0]}x{self.shape[1]}@{self.shape[2]}, " if self.shape else ""
        return f"{layer}{self.images} {unit}"


@dataclass(frozen=True)
class Table:
    """A device's table: entries by (op, kernel or kind of layer, precision)."""

    ops: dict[tuple[str, str], tuple[Entry, ...]]
    tiles: dict[tuple[str, str], tuple[Entry, ...]]
    inputs: dict[tuple[str, str], tuple[Entry, ...]]
    launch: dict[tuple[str, str], tuple[Entry, ...]]


class Found(NamedTuple):
    """The result of a lookup: the entry, None if there is none, and why; `kind` is the same for every shape that is
    missing for one reason."""

    entry: Entry | None
    why: str
    kind: str = ""


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """The table's name for a type; `tf32` says whether float32 products may use the tensor cores.

    Raises:
        KeyError: a type that no table has.
    """
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32" if tf32 else "fp32"}
    return names[dtype]


@functools.cache
def device_name(device: torch.device) -> str | None:
    """The name that its table goes by; None if it is not a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def slug(name: str) -> str:
    """A device's name in a file's: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def load(name: str) -> tuple[Table | None, str]:
    """The table of the device called `name`, or None and why; read once. Warns of a file that cannot be used."""
    path = FOLDER / f"{slug(name)}.json"
    if not path.exists():
        return None, f"no tuned table for {name}"
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), name), ""
    except (OSError, ValueError, RecursionError) as error:
        why = f"the tuned table {path.name} cannot be used: {error}"
        warnings.warn(f"{why}; using the default tiles", RuntimeWarning, stacklevel=3)
        return None, why


def parse(data: Any, name: str) -> Table:
    """A table from what its file says.

    Raises:
        ValueError: it is none, or not of the device called `name`; the message says where.
    """
    if not isinstance(data, dict) or data.get("device") != name:
        device = data.get("device") if isinstance(data, dict) else None
        raise ValueError(f"its device is {device!r}: expected {name!r}")
    return Table(
        _entries(data.get("ops", {}), lambda where, op, value: (_recipe(where, value), None)),
        _entries(data.get("tiles", {}), _tiled),
        _entries(data.get("inputs", {}), lambda where, kind, value: (_recipe(where, value, INPUTS), None)),
        _entries(data.get("launch", {}), lambda where, step, value: (_recipe(where, value, LAUNCHES), None)),
    )


def _entries(
    section: Any, read: Callable[[str, str, Any], tuple[str, Any]]
) -> dict[tuple[str, str], tuple[Entry, ...]]:
    found: dict[tuple[str, str], list[Entry]] = {}
    for (name, key, precision, images), value in _leaves(section, 4):
        where = f"{name}/{key}/{precision}/{images}"
        shape = () if key == "any" else tuple(map(int, re.split("[x@]", _matched(where, r"\d+x\d+@\d+", key))))
        if 0 in shape or precision not in PRECISIONS:
            raise ValueError(f"{where}: expected a shape without zeros and a precision of {', '.join(PRECISIONS)}")
        count = int(_matched(where, "[1-9][0-9]{0,8}", images))
        found.setdefault((name, precision), []).append(Entry(shape, count, *read(where, name, value)))
    return {key: tuple(entries) for key, entries in found.items()}


def _leaves(section: Any, depth: int, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What lies `depth` levels of dicts deep, and the way there."""
    if depth == 0:
        yield path, section
        return
    if not isinstance(section, dict):
        raise ValueError(f"{'/'.join(path) or 'a section'} is {type(section).__name__}: expected an object")
    for key, value in section.items():
        yield from _leaves(value, depth - 1, (*path, key))


def _matched(where: str, pattern: str, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{where}: {text!r} is not of the form {pattern}")
    return text


def _recipe(where: str, value: Any, accepted: tuple[str, ...] = RECIPES) -> str:
    if value not in accepted:
        raise ValueError(f"{where}: recipe is {value!r}, accepted are {', '.join(accepted)}")
    return value


def _tiled(where: str, kernel: str, value: Any) -> tuple[str, Config | None]:
    """A kernel's recipe, and its tile where the recipe is ours."""
    if kernel not in CONFIGS or not isinstance(value, dict):
        raise ValueError(f"{where}: expected one of {', '.join(CONFIGS)}, with a recipe")
    recipe, tile = _recipe(where, value.get("recipe")), value.get("tile")
    if recipe not in ("triton", "cuda") or (recipe == "cuda" and tile is None):
        return recipe, None
    kind = CONFIGS[kernel] if recipe == "triton" else CudaConfig
    names = {field.name for field in fields(kind)}
    if not isinstance(tile, dict) or set(tile) != names:
        raise ValueError(f"{where}: tile is {tile!r}, expected {', '.join(sorted(names))}")
    for field, size in tile.items():
        if field == "tma":
            fine = isinstance(size, bool)
        else:
            fine = type(size) is int and 0 < size <= MOST.get(field, MOST_OF_A_TILE)
            fine = fine and (field in ("stages", "split") or size & (size - 1) == 0)
        if not fine:
            raise ValueError(f"{where}: {field} is {size!r}")
    return recipe, kind(**tile)


def nearest(
    entries: tuple[Entry, ...], shape: Shape, images: int | None, fits: Callable[[Entry], bool] = lambda entry: True
) -> Entry | None:
    """The entry measured nearest to a shape: by its layer first, then by its images; None if none is near or fits.

    Distances are between logarithms: twice as large is as far as half as large. `images` None is equally near to all.
    """

    def apart(entry: Entry) -> tuple[float, float]:
        return (
            sum(abs(math.log2(theirs / ours)) for theirs, ours in zip(entry.shape, shape, strict=True)),
            0.0 if images is None else abs(math.log2(entry.images / images)),
        )

    near = [
        entry
        for entry in entries
        if len(entry.shape) == len(shape)
        and all(1 / NEAR <= theirs / ours <= NEAR for theirs, ours in zip(entry.shape, shape, strict=True))
        and (images is None or 1 / NEAR_IMAGES <= entry.images / images <= NEAR_IMAGES)
        and fits(entry)
    ]
    return min(near, key=apart, default=None)


@functools.lru_cache(maxsize=4096)
def recipe(name: str, op: str, shape: Shape, precision: str, images: int | None) -> Found:
    """The recipe by which the device called `name` runs a public op."""
    table, why = load(name)
    if table is None:
        return Found(None, why)
    entry = nearest(table.ops.get((op, precision), ()), shape, images)
    unit = "parameters" if op == "adam_step" else "images"
    if entry is None:
        size = "" if images is None else f" of {images} {unit}"
        layer = f" on {shape[0]}x{shape[1]}@{shape[2]}" if shape else ""
        missing = f"the tuned table has no {op} in {precision}"
        return Found(None, f"{missing}{layer}{size}, nor a near one", missing)
    same = entry.shape == shape and images in (None, entry.images)
    return Found(entry, "fastest in the tuned table" + ("" if same else f" (at {entry.of(unit)})"))


@functools.lru_cache(maxsize=4096)
def tile(name: str, kernel: str, shape: Shape, precision: str, images: int) -> Entry | None:
    """What was fastest for a kernel on the device called `name`: its recipe, and a tile that fits; None if unknown."""
    table, _ = load(name)
    if table is None:
        return None
    itemsize = 4 if precision in ("fp32", "tf32") else 2

    onto_an_image = kernel == "conv_transpose" and shape[1] <= IMAGE_CHANNELS

    def fits(entry: Entry) -> bool:
        c = entry.tile
        if c is None or isinstance(c, CudaConfig):
            return True  # the launcher takes what of a cluster fits
        if kernel == "conv_transpose" and onto_an_image != (entry.shape[1] <= IMAGE_CHANNELS):
            return False  # another kernel's
        if onto_an_image and min(inner(shape[2], c.height), inner(shape[2], c.width)) < 1:
            return False
        if not c.tma:
            return kernel != "wgrad" or c.taps == 1 or shape[1] >= FLAT_CHANNELS
        whole = kernel != "conv" or shape[0] % c.depth == 0
        return whole and tma_fits(shape[:1] if kernel == "conv" or onto_an_image else shape[:2], itemsize)

    return nearest(table.tiles.get((kernel, precision), ()), shape, images, fits)


def explain(name: str, kernel: str, shape: Shape, precision: str, images: int) -> tuple[str, str]:
    """The recipe that was fastest for a kernel on the device called `name`, `triton` where unknown, and which tile."""
    table, why = load(name)
    if table is None:
        return "triton", f"the default tile: {why}"
    entry = tile(name, kernel, shape, precision, images)
    if entry is None:
        return "triton", "the default tile: the tuned table has nothing near"
    return entry.recipe, f"fastest at {entry}"


@functools.lru_cache(maxsize=4096)
def deferred(name: str | None, layer: Layer, precision: str, images: int, weights: bool = True) -> tuple[bool, str]:
    """Whether whoever reads a layer's input should apply its batch norm and activation in the load, and why.

    Args:
        name: of the device; None for what is no GPU.
        layer: that reads the input.
        weights: whether its weight gradient reads the input too.
    """
    kind = layer.kind if weights else f"{layer.kind}_forward"
    shape = (layer.in_channels, layer.out_channels, layer.in_size)
    table = load(name)[0] if name else None
    entry = nearest(table.inputs.get((kind, precision), ()), shape, images) if table else None
    if entry is not None:
        return entry.recipe == "deferred", f"fastest at {entry}"
    onto_an_image = layer.kind == "conv_transpose" and layer.out_channels <= IMAGE_CHANNELS
    product = tile(name, layer.kind, shape, precision, images) if table and onto_an_image else None
    if product is not None and product.recipe != "triton":
        return False, f"the default: the recipe {product.recipe} has no prologue"
    why = "bound by memory" if onto_an_image else "the tensor cores would wait for it"
    return onto_an_image, f"the default: {why}"


@functools.lru_cache(maxsize=4096)
def dependent(name: str | None, precision: str, images: int) -> tuple[bool, str]:
    """Whether a captured step of `images` should launch its kernels as `kernels.dependent` has it, and why; `name`
    is the device's, None for what is no GPU."""
    table = load(name)[0] if name else None
    entry = nearest(table.launch.get(("step", precision), ()), (), images) if table else None
    if entry is None:
        return False, "the default: not measured on this device"
    return entry.recipe == "dependent", f"fastest at {entry}"


def forget() -> None:
    """Read the tables again at the next lookup, after one was written."""
    for cached in (device_name, load, recipe, tile, deferred, dependent):
        cached.cache_clear()
