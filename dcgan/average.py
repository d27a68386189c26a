"""An exponential moving average of a generator's weights, for smoother samples."""

import copy

import torch
from torch import nn


class Average:
    """The average of a model's parameters and buffers over its updates; the first update begins it.

    What follows is torch's AveragedModel with an EMA's decay, but from the second update on it asks the device nothing,
    so that a CUDA graph can hold it.

    Args:
        model: what is averaged; its memory format is kept.
        decay: the weight of the past, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.count = model, decay, 0
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.module.zero_grad(set_to_none=True)  # the model's were copied too

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is now."""
        ours = [*self.module.parameters(), *self.module.buffers()]
        theirs = [*(p.detach() for p in self.model.parameters()), *self.model.buffers()]
        moving, copied = [], []
        for pair in zip(ours, theirs, strict=True):
            (moving if self.count and pair[0].is_floating_point() else copied).append(pair)
        if moving:
            torch._foreach_lerp_(*map(list, zip(*moving, strict=True)), 1 - self.decay)
        torch._foreach_copy_(*map(list, zip(*copied, strict=True)))
        self.count += 1
