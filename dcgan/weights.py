"""A network's parameters, gradients and Adam moments at addresses that stay, and the 16-bit copies that GEMMs read.

A captured graph and a table of addresses both trust that nothing moves. Whoever changes the weights from outside (a
checkpoint, a rollback, a user) does it in place or by new tensors; `refresh` notices both, but for what is written in
place through `.data`, which PyTorch does not count: where 16-bit copies are made, change weights under `no_grad`.
"""

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
UNSERVED = {"weight_decay": 0, "amsgrad": False, "maximize": False, "decoupled_weight_decay": False}
"""Options of torch's Adam that the fused update lacks, with the value they must have."""


class Weights:
    """What one network's update reads and writes.

    Args:
        model: its convolution weights are moved to channels_last memory, in place.
        optimizer: Adam over the model's parameters, one group. Its state is kept true: what it holds is what the
            launcher updates, with one step counter for all parameters.
        launch: a backend's launchers: `adam_table` and `adam`.
        dtype: of the copies that the GEMMs read; none are made where the parameters have it already.
        loss_scale: (3,) float32, of `kernels._triton.adam.adam`: what the gradients carry; None for none.
        move_scale: whether this network's update is the step's last, which moves the scale.

    Raises:
        ValueError: an option or a grouping of the optimiser that the fused update lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Adam,
        launch: ModuleType | SimpleNamespace,
        dtype: torch.dtype,
        loss_scale: Tensor | None,
        move_scale: bool,
    ):
        model.to(memory_format=torch.channels_last)
        self.model, self.optimizer, self.launch, self.dtype = model, optimizer, launch, dtype
        self.loss_scale, self.move_scale = loss_scale, move_scale
        parameters = list(model.parameters())
        self.step = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
        self._seen: list[tuple[int, int]] = []
        self._place(parameters)
        self._constants = self._read_constants()

    def _place(self, parameters: Sequence[Tensor]) -> None:
        """Make the tensors that belong to the parameters, where these are now."""
        self.parameters = parameters
        self.grads = [torch.zeros_like(p) for p in parameters]
        self.moments = {name: [torch.zeros_like(p) for p in parameters] for name in MOMENTS}
        packed = [p.ndim == 4 and p.dtype != self.dtype for p in parameters]
        self.copies = [torch.empty_like(p, dtype=self.dtype) if is_packed else None
                       for p, is_packed in zip(parameters, packed, strict=True)]  # fmt: skip
        self._entries = [dict.fromkeys(("step", *MOMENTS)) for _ in parameters]
        data = [p.detach() for p in parameters]
        self.table = self.launch.adam_table(data, self.grads, *self.moments.values(), self.copies)
        for parameter, grad in zip(parameters, self.grads, strict=True):
            parameter.grad = grad

    def packed(self, parameter: Tensor) -> Tensor:
        """What the GEMMs read of a convolution's weight: (low, R, S, high), contiguous, of `dtype`."""
        index = next(i for i, p in enumerate(self.parameters) if p is parameter)
        copy = self.copies[index]
        return (parameter.detach() if copy is None else copy).permute(0, 2, 3, 1)

    def refresh(self) -> bool:
        """Take over what changed outside: weights, optimiser state, addresses, options.

        Returns:
            Whether a captured graph is void: parameters or buffers are elsewhere than at the last call, or the
            optimiser's rate or another of its options, which a graph holds as constants, is not what it was.
        """
        before, self._constants = self._constants, self._read_constants()
        parameters = list(self.model.parameters())
        seen = [(p.data_ptr(), p._version) for p in parameters]
        moved = [at for at, _ in seen] != [at for at, _ in self._seen] if self._seen else False
        if moved:
            self.model.to(memory_format=torch.channels_last)
            self._place(list(self.model.parameters()))
        state = self.optimizer.state
        entries = zip(self.parameters, self._entries, strict=True)
        if moved or any(state.get(parameter) is not entry for parameter, entry in entries):
            self._adopt()
        if moved or seen != self._seen:
            pairs = [(c, p.detach()) for c, p in zip(self.copies, self.parameters, strict=True) if c is not None]
            if pairs:
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
            self._seen = [(p.data_ptr(), p._version) for p in self.parameters]
        return moved or before != self._constants

    def _read_constants(self) -> list:
        """What a captured update holds beside the parameters' addresses.

        Raises:
            ValueError: an option that the fused update lacks.
        """
        groups = self.optimizer.param_groups
        if len(groups) != 1 or len(groups[0]["params"]) != len(self.parameters):
            raise ValueError(f"the optimiser has {len(groups)} groups: the fused update takes one of all")
        for name, value in UNSERVED.items():
            if (got := groups[0].get(name, value)) != value:
                raise ValueError(f"the optimiser has {name}={got}: the fused update accepts only {value}")
        return [groups[0][name] for name in ("lr", "betas", "eps")] + [b.data_ptr() for b in self.model.buffers()]

    def _adopt(self) -> None:
        """Copy the optimiser's state into our tensors, and put these in its place."""
        state = self.optimizer.state
        steps = {float(state[p]["step"]) for p in self.parameters if state.get(p)}
        if len(steps) > 1:
            raise ValueError(
                f"the optimiser's parameters are at steps {sorted(steps)}: the fused update has one counter"
            )
        self.step.fill_(steps.pop() if steps else 0.0)
        for index, parameter in enumerate(self.parameters):
            theirs, ours = state.get(parameter) or {}, self._entries[index]
            for name in MOMENTS:
                ours[name] = self.moments[name][index]
                if name not in theirs:
                    ours[name].zero_()
                elif theirs[name] is not ours[name]:
                    ours[name].copy_(theirs[name])
            ours["step"] = self.step
            state[parameter] = ours

    def update(self) -> None:
        """One step of Adam from `grads`, the copies written as it goes."""
        group = self.optimizer.param_groups[0]
        self.launch.adam(
            self.table, self.step, group["lr"], group["betas"], group["eps"], self.loss_scale, self.move_scale
        )
