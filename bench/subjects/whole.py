"""The public ops that belong to no convolution as subjects: `gan_loss`, `adam_step`, `gather_images`, by backend."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.roofline import ADAM_BYTES, SINGLE, Kernel
from bench.subjects.accuracy import DTYPES, Answers, Noise, Outputs, Subject, runnable, walk
from dcgan.arch import Arch
from kernels import reference
from kernels.geometry import Layer

RECIPES = ("eager", "triton", "cuda")
"""Their `library` is Triton's kernels: there is no product among them."""

ROWS = 4096
"""Images of the dataset that the gather reads, all of them on the device."""

LR, BETAS = 2e-4, (0.5, 0.999)


@dataclass(frozen=True)
class Whole:
    """One of them.

    Args:
        op: its public name.
        layers: of the network whose parameters are updated, whose logits or whose images they are.
        images: N. groups: of the logits. precision: of the images, and of Adam's 16-bit copies.
    """

    op: str
    layers: tuple[Layer, ...]
    images: int
    groups: int = 1
    precision: str = "bf16"

    direction = "step"

    def name(self, recipe: str) -> str:
        where = {"adam_step": self.layers[0].name[0], "gan_loss": self.layers[-1].name}.get(self.op, "D1")
        return f"{self.op}/{where}/step/{recipe}/{self.precision}/b{self.images}"

    @property
    def count(self) -> int:
        """What the tuned table has for images: of Adam the parameters."""
        return sum(layer.parameters for layer in self.layers) if self.op == "adam_step" else self.images

    def recipes(self, device: torch.device) -> list[str]:
        return runnable(RECIPES, device, self.precision)

    def work(self) -> Kernel:
        size = DTYPES[self.precision].itemsize
        moved = {
            "adam_step": ADAM_BYTES * self.count,
            "gan_loss": 2 * SINGLE * self.images,
            "gather_images": self.layers[0].in_elements(self.images) * (1 + size),
        }
        return Kernel("step", self.op, "", 0, moved[self.op])

    def build(self, device: torch.device) -> Subject:
        inputs = INPUTS[self.op](self, Noise(device, self.precision))
        call = CALLS[self.op]

        def run(recipe: str) -> Callable[[], Outputs]:
            return lambda: call(cloned(inputs), recipe)

        def timed(recipe: str) -> Callable[[], object]:
            own = cloned(inputs)
            return lambda: call(own, recipe)

        runs = {recipe: run(recipe) for recipe in RECIPES}
        timing = {recipe: timed(recipe) for recipe in RECIPES}
        return Subject(runs, lambda: ANSWERS[self.op](inputs), self.precision, timing)


def step_wholes(arch: Arch, batch: int, precision: str = "bf16") -> Iterator[Whole]:
    """Those of a training step at `batch` images."""
    g, d = arch.generator, arch.discriminator
    yield Whole("adam_step", d, batch, 1, precision)
    yield Whole("adam_step", g, batch, 1, precision)
    yield Whole("gather_images", d, batch, 1, precision)
    yield Whole("gan_loss", d, 2 * batch, 2, precision)
    yield Whole("gan_loss", d, batch, 1, precision)


Inputs = dict[str, Any]


def cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: cloned(part) if name not in ("rows", "permutation", "flip") else part
                for name, part in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [cloned(part) for part in value]
    return value.clone() if isinstance(value, Tensor) else value


def _loss_inputs(w: Whole, noise: Noise) -> Inputs:
    return {"logits": noise.single(w.images, scale=3.0), "real": (True, False)[: w.groups]}


def _adam_inputs(w: Whole, noise: Noise) -> Inputs:
    def each(scale: float) -> list[Tensor]:
        return [noise.single(layer.weights, scale=scale) for layer in w.layers]

    half = noise.dtype if noise.dtype.itemsize == 2 else torch.bfloat16
    params, grads, means = each(0.02), each(1e-2), each(1e-2)
    squares, copies = [v.square() for v in each(1e-2)], [p.to(half) for p in params]
    return {"lists": [params, grads, means, squares], "copies": copies, "step": torch.full_like(params[0][0], 7.0)}


def _gather_inputs(w: Whole, noise: Noise) -> Inputs:
    layer, length = w.layers[0], max(ROWS, w.images)
    options = {"generator": noise.generator, "device": noise.device}
    shape = (length, layer.in_size, layer.in_size, layer.in_channels)
    cursor = torch.full((), length - w.images // 2 - 1, dtype=torch.int64, device=noise.device)  # it wraps around
    return {
        "rows": torch.randint(256, shape, dtype=torch.uint8, **options),
        "permutation": torch.randperm(length, **options),
        "cursor": cursor,
        "batch": w.images,
        "flip": torch.randint(2, (length,), dtype=torch.uint8, **options),
        "dtype": noise.dtype,
    }


def _loss(i: Inputs, recipe: str) -> Outputs:
    with torch.enable_grad():
        logits = i["logits"].detach().requires_grad_()
        losses, probabilities = kernels.gan_loss(logits, i["real"], backend=recipe)
        (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    return {"losses": losses.detach(), "probabilities": probabilities, "dlogits": dlogits}


def _adam(i: Inputs, recipe: str) -> Outputs:
    kernels.adam_step(*i["lists"], i["step"], lr=LR, betas=BETAS, copies=i["copies"], backend=recipe)
    return _named(i["lists"], i["copies"], i["step"])


def _named(lists: list[list[Tensor]], copies: list[Tensor], step: Tensor) -> Outputs:
    found = {f"{name}{k}": t for name, ts in zip("pgmv", lists, strict=True) for k, t in enumerate(ts)}
    return found | {f"copy{k}": t for k, t in enumerate(copies)} | {"step": step}


def _gather(i: Inputs, recipe: str) -> Outputs:
    own = {name: part for name, part in i.items() if name not in ("rows", "permutation", "cursor", "batch")}
    images = kernels.gather_images(i["rows"], i["permutation"], i["cursor"], i["batch"], **own, backend=recipe)
    return {"images": images, "cursor": i["cursor"].double()}


def _loss_answers(i: Inputs) -> Answers:
    def plain(logits: Tensor) -> Outputs:
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            parts = logits.view(len(i["real"]), -1)
            losses = [F.binary_cross_entropy_with_logits(part, torch.full_like(part, float(is_real)))
                      for part, is_real in zip(parts, i["real"], strict=True)]  # fmt: skip
            (dlogits,) = torch.autograd.grad(sum(losses), logits)
        found = {"losses": torch.stack(losses), "probabilities": parts.sigmoid().mean(1), "dlogits": dlogits}
        return {name: t.detach() for name, t in found.items()}

    oracle = plain(i["logits"].double())
    terms = len(i["logits"])
    slack = {name: walk(terms, torch.float32, oracle[name].abs().max().item()) for name in ("losses", "probabilities")}
    return Answers(oracle, plain(i["logits"]), slack)


def _adam_answers(i: Inputs) -> Answers:
    def updated(lists: list[list[Tensor]]) -> Outputs:
        new = [reference.adam_update(*group, 8, LR, BETAS) for group in zip(*lists, strict=True)]
        params, means, squares = ([group[k] for group in new] for k in range(3))
        copies = [p.to(copy.dtype) for p, copy in zip(params, i["copies"], strict=True)]
        exact = params[0].dtype == torch.float64
        return _named([params, lists[1], means, squares], params if exact else copies, i["step"].double() + 1)

    return Answers(updated([[t.double() for t in ts] for ts in i["lists"]]), updated(i["lists"]))


def _gather_answers(i: Inputs) -> Answers:
    def plain(dtype: torch.dtype) -> Outputs:
        own = {name: part for name, part in i.items() if name != "dtype"}
        images = reference.gather(**cloned(own), dtype=dtype)
        return {"images": images.permute(0, 3, 1, 2), "cursor": i["cursor"].double() + i["batch"]}

    return Answers(plain(torch.float64), plain(i["dtype"]))


INPUTS = {"gan_loss": _loss_inputs, "adam_step": _adam_inputs, "gather_images": _gather_inputs}
CALLS = {"gan_loss": _loss, "adam_step": _adam, "gather_images": _gather}
ANSWERS = {"gan_loss": _loss_answers, "adam_step": _adam_answers, "gather_images": _gather_answers}
