"""The launchers of each backend, by name: the kernels of a step, with the same signatures and results everywhere.

`conv`, `conv_transpose`, `wgrad`, `sum_shares`; `statistics`, `merge_statistics`, `apply`, `activation_grad`,
`merge_sums`, `apply_grad`; `head`, `head_grad`, `gan_loss`; `adam_table`, `adam`; `gather`. `kernels._triton` says
what each does.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from kernels import reference, tuning
from kernels.geometry import CudaConfig, Deferred, raw
from kernels.library import Products

GEMMS = ("conv", "conv_transpose", "wgrad")


@functools.cache
def launchers(backend: str) -> ModuleType | SimpleNamespace:
    """A backend's launchers.

    Args:
        backend: `eager`, the reference twins; `triton`, its products on tuned tiles where the device has any; `cuda`,
            the extension's, and Triton's where it has none; `library`, the library's products and Triton's kernels
            around them; `auto`, for each product what the device's table has as fastest for its shape, else Triton's.
    """
    if backend == "eager":
        return reference
    triton = _triton()
    library = Products(triton)
    recipes: dict[str, dict[str, Callable]] = {
        "triton": {name: getattr(triton, name) for name in GEMMS},
        "library": {name: getattr(library, name) for name in GEMMS},
    }
    if backend == "library":
        return _namespace(triton, recipes["library"])
    if backend == "triton":
        return _namespace(triton, {name: _tiled(name, recipes) for name in GEMMS})
    if backend == "cuda":
        recipes["cuda"] = _cuda(launchers("triton"))
        tiled = {name: _tiled(name, recipes, ("cuda",), "cuda") for name in GEMMS}
        return _namespace(launchers("triton"), recipes["cuda"] | tiled)
    if _cuda_missing() is None:
        recipes["cuda"] = _cuda(triton)
    return _namespace(triton, {name: _tiled(name, recipes, tuple(recipes)) for name in GEMMS})


def _namespace(base: SimpleNamespace, changes: dict[str, Callable]) -> SimpleNamespace:
    return SimpleNamespace(**(vars(base) | changes))


def _triton() -> SimpleNamespace:
    from kernels._triton import adam, batch_norm, batch_norm_grad, conv, conv_transpose, gather, head, wgrad

    return SimpleNamespace(
        conv=conv.conv,
        conv_transpose=conv_transpose.conv_transpose,
        wgrad=wgrad.wgrad,
        sum_shares=wgrad.sum_shares,
        statistics=batch_norm.statistics,
        merge_statistics=batch_norm.merge_statistics,
        apply=batch_norm.apply,
        activation_grad=batch_norm_grad.activation_grad,
        merge_sums=batch_norm_grad.merge_sums,
        apply_grad=batch_norm_grad.apply_grad,
        head=head.head,
        head_grad=head.head_grad,
        gan_loss=head.gan_loss,
        adam_table=adam.adam_table,
        adam=adam.adam,
        gather=gather.gather,
    )


def _cuda_missing() -> str | None:
    from kernels import _cuda

    return _cuda.available()


def _cuda(triton: SimpleNamespace) -> dict[str, Callable]:
    """The extension's launchers, with Triton's behind them for the calls that it leaves to others."""
    from kernels._cuda import adam, batch_norm, conv, head

    own = {
        conv: GEMMS,
        batch_norm: ("statistics", "merge_statistics", "apply", "activation_grad", "merge_sums", "apply_grad"),
        head: ("head", "head_grad", "gan_loss"),
    }
    found = {}
    for module, names in own.items():
        for name in names:
            missing = functools.partial(conv.missing, name) if name in GEMMS else None
            found[name] = _where_served(getattr(module, name), getattr(triton, name), missing)
    return found | {"adam_table": adam.adam_table, "adam": adam.adam}  # a table is its own backend's


def by_name(names: list[str], arguments: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; TypeError where there are more than `names`, or one is given twice."""
    if len(arguments) > len(names):
        raise TypeError(f"{len(arguments)} arguments by position: at most {len(names)}, {', '.join(names)}")
    placed = dict(zip(names, arguments, strict=False))
    if twice := placed.keys() & options.keys():
        raise TypeError(f"{', '.join(sorted(twice))}: given by position and by name")
    return placed | options


def _where_served(launch: Callable, instead: Callable, missing: Callable[..., str | None] | None = None) -> Callable:
    """A launcher of the extension where it has a kernel for the call, and takes its arguments; else `instead`.

    The extension's products have no prologue.
    """
    own, named = set(inspect.signature(launch).parameters), list(inspect.signature(instead).parameters)

    @functools.wraps(instead)
    def served(*arguments: Any, **options: Any) -> Any:
        options = by_name(named, arguments, options)
        lacks = any(value is not None for name, value in options.items() if name not in own)
        lacks |= any(isinstance(value, Deferred) for value in options.values())
        if lacks or (missing and missing(*(options[name] for name in named[:2]), options.get("epilogue"))):
            if isinstance(options.get("config"), CudaConfig):
                del options["config"]
            return instead(**options)
        return launch(**{name: value for name, value in options.items() if name in own})

    return served


def _tiled(
    kernel: str, recipes: dict[str, dict[str, Callable]], allowed: tuple[str, ...] = ("triton",), other: str = "triton"
) -> Callable:
    """A product's launcher that looks its shape up in the device's table first, for a recipe of `allowed`; without one
    it is by `other`, at its own choice of tile."""
    default = recipes[other][kernel]
    two = list(inspect.signature(getattr(reference, kernel)).parameters)[:2]
    named = two + list(inspect.signature(default).parameters)[2:]

    @functools.wraps(default)
    def launch(*arguments: Any, **options: Any) -> Any:
        options = by_name(named, arguments, options)
        first, second = (options.pop(name) for name in two)
        entry = None if options.get("config") else _entry(kernel, raw(first), raw(second), options)
        if entry is None or entry.recipe not in allowed:
            return default(first, second, **options)
        options.pop("config", None)
        if entry.tile is not None:
            options["config"] = entry.tile
        return recipes[entry.recipe][kernel](first, second, **options)

    return launch


def _entry(kernel: str, first: Tensor, second: Tensor, options: dict[str, Any]) -> tuning.Entry | None:
    """What the table has for a product of NHWC maps and a packed weight."""
    name = tuning.device_name(first.device)
    if name is None:
        return None
    out = second.shape[0] if kernel == "conv" else second.shape[3]
    epilogue = options.get("epilogue")
    onto_an_image = kernel == "conv_transpose" and out <= tuning.IMAGE_CHANNELS
    if onto_an_image and epilogue and epilogue.mode not in ("activation", "activation_grad"):
        return None  # the table's tiles there are of the kernel onto an image, which knows no batch norm
    precision = tuning.precision_of(first.dtype, options.get("precision") == "tf32")
    return tuning.tile(name, kernel, (first.shape[3], out, first.shape[1]), precision, first.shape[0])
