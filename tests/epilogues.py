"""Epilogues of noise for tests of products, whatever backend computes them."""

from interpreter import fenced, tensor

from kernels import reference
from kernels.geometry import Epilogue


def doubled(epilogue):
    """The same epilogue in float64."""
    parts = {name: t.double() for name in ("saved", "state") if (t := getattr(epilogue, name)) is not None}
    return Epilogue(epilogue.activation, epilogue.slope, epilogue.groups, epilogue.statistics, **parts)


def epilogue_of(generator, mode, activation, groups, shape, dtype):
    """An epilogue for an output of `shape`, its tensors made of noise."""
    if mode == "statistics":
        return Epilogue(statistics=True, groups=groups)
    if mode == "activation":
        return Epilogue(activation, groups=groups)
    saved = tensor(generator, *shape, dtype=dtype)
    if mode == "batch_norm":
        return Epilogue(activation, groups=groups, state=fenced(state_of(generator, saved, groups)))
    if mode == "activation_grad":
        return Epilogue(activation, groups=groups, saved=fenced(saved.tanh()) if activation == "tanh" else saved)
    return Epilogue(activation, groups=groups, saved=saved, state=fenced(state_of(generator, saved, groups)))


def state_of(generator, y, groups):
    """The batch-norm state of a map, its weight and bias noise."""
    vectors = (tensor(generator, y.shape[3]) for _ in range(2))
    return reference.merge_statistics(reference.statistics(y, groups), *vectors)
