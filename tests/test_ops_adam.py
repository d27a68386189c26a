"""`adam_step` against torch.optim.Adam, through every way of running it that needs no GPU."""

import math
import sys
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch

import kernels
from kernels import reference
from kernels.dispatch import BackendError


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Network:
    """Two parameters, one of them a convolution's in channels_last memory; and torch's Adam over the same."""

    def __init__(self, dtype=torch.float32, copies=True):
        shapes = ((6, 3, 4, 4), (7,))
        self.lists = [[self.place(noise(*shape, dtype=dtype, seed=10 * k + i)) for i, shape in enumerate(shapes)]
                      for k in range(4)]  # fmt: skip
        self.params, self.grads, self.m, self.v = self.lists
        for v in self.v:
            v.abs_()
        self.copies = [torch.empty_like(self.params[0], dtype=torch.bfloat16), None] if copies else None
        self.step = torch.tensor(5)
        self.twins = [p.clone().requires_grad_() for p in self.params]
        self.optimizer = torch.optim.Adam(self.twins, lr=1e-2, betas=(0.5, 0.999))
        for p, m, v in zip(self.twins, self.m, self.v, strict=True):
            self.optimizer.state[p] = {"step": torch.tensor(5.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}

    @staticmethod
    def place(t):
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    def update(self, **options):
        kernels.adam_step(*self.lists, self.step, **{"lr": 1e-2, "copies": self.copies} | options)

    def check(self):
        for p, m, v, twin in zip(self.params, self.m, self.v, self.twins, strict=True):
            state = self.optimizer.state[twin]
            torch.testing.assert_close(p, twin.detach())
            torch.testing.assert_close(m, state["exp_avg"])
            torch.testing.assert_close(v, state["exp_avg_sq"])
            assert self.step == state["step"]
        if self.copies:
            assert torch.equal(self.copies[0], self.params[0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step_dtype", [torch.int64, torch.float32])
def test_adam_is_torch_s(dtype, step_dtype):
    network = Network(dtype)
    network.step = network.step.to(step_dtype)
    for _ in range(3):
        for g, twin in zip(network.grads, network.twins, strict=True):
            g.mul_(-1.5)
            twin.grad = g.clone()
        network.optimizer.step()
        network.update()
        network.check()


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_adam_with_a_loss_scale_is_torch_s_with_a_grad_scaler(bad):
    """tests/test_triton_loss_scale.py has the whole of it; here, that the op hands it on."""
    network, loss_scale = Network(), kernels.new_loss_scale(first=256.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    for g, twin in zip(network.grads, network.twins, strict=True):
        g.mul_(256)
        if bad is not None and g.ndim == 1:
            g[3] = bad
        twin.grad = g.clone()
    before = [g.clone() for g in network.grads]
    scaler.step(network.optimizer)
    scaler.update()
    network.update(loss_scale=loss_scale)
    assert loss_scale.tolist() == [scaler.get_scale(), scaler._get_growth_tracker(), 0]
    network.copies = None if bad is not None else network.copies  # the update was skipped: nothing was rounded
    network.check()
    for g, same in zip(network.grads, before, strict=True):
        assert torch.equal(g, same) or bad is math.nan


def test_adam_takes_parameters_that_require_gradients_and_marks_them_changed():
    network = Network()
    network.lists[0] = [torch.nn.Parameter(p) for p in network.params]
    versions = [p._version for p in network.lists[0]]
    loss = (network.lists[0][1] ** 2).sum()
    network.update()
    assert all(p._version > version for p, version in zip(network.lists[0], versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck_of_adam():
    network = Network()
    for loss_scale in (None, kernels.new_loss_scale()):
        arguments = (*network.lists, [network.copies[0]], [0], network.step, loss_scale)
        torch.library.opcheck(
            torch.ops.dcgan_kernels.adam_step.default, (*arguments, 1e-3, 0.5, 0.999, 1e-8, True, "eager")
        )


def test_adam_compiles_without_graph_breaks():
    plain, compiled = Network(), Network()
    plain.update()
    run = torch.compile(
        lambda n, step: kernels.adam_step(*n, step, lr=1e-2, copies=compiled.copies), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    run(compiled.lists, compiled.step)
    for ours, theirs in zip((*compiled.lists, compiled.copies[:1]), (*plain.lists, plain.copies[:1]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert compiled.step == 6


WRONG = {
    "params is empty": lambda n: [part.clear() for part in n.lists],
    "grads has 1 tensors: expected 2": lambda n: n.grads.pop(),
    "grads[0] has shape (6, 3, 4, 4) and strides (48, 16, 4, 1)": lambda n: n.grads.__setitem__(
        0, n.grads[0].contiguous()
    ),
    "exp_avgs[1] has shape (8,)": lambda n: n.m.__setitem__(1, torch.zeros(8)),
    "exp_avgs[1] is torch.float64: expected torch.float32": lambda n: n.m.__setitem__(1, n.m[1].double()),
    "exp_avg_sqs[0] is on meta, params[0] on cpu": lambda n: n.v.__setitem__(0, n.v[0].to("meta")),
    "copies[0] is torch.float32: expected torch.bfloat16 or torch.float16": lambda n: n.copies.__setitem__(
        0, n.params[0]
    ),
    "copies has 3 tensors": lambda n: n.copies.append(None),
    "copies are of ['torch.bfloat16', 'torch.float16']": lambda n: n.copies.__setitem__(1, n.params[1].half()),
    "step is torch.int32": lambda n: setattr(n, "step", n.step.int()),
    "step is (1,) on cpu: expected ()": lambda n: setattr(n, "step", n.step[None]),
    "params[1] has strides (2,): it must be dense": lambda n: [
        part.__setitem__(1, torch.zeros(14)[::2]) for part in n.lists
    ],
    "params[1] has strides (0,): it must be dense": lambda n: [
        part.__setitem__(1, torch.zeros(1).expand(7)) for part in n.lists
    ],
    "params[1] has shape (0,): it must not be empty": lambda n: [
        part.__setitem__(1, torch.zeros(0)) for part in n.lists
    ],
    "params[0] is torch.int64: expected torch.float32": lambda n: n.params.__setitem__(0, n.params[0].long()),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_input_of_adam(said):
    network = Network()
    WRONG[said](network)
    with pytest.raises((ValueError, TypeError)) as error:
        network.update()
    assert said in str(error.value)


def test_a_list_of_adam_that_is_none_is_named():
    for place, name in enumerate(("params", "grads", "exp_avgs", "exp_avg_sqs")):
        network = Network()
        network.lists[place] = None
        with pytest.raises(TypeError, match=f"{name} is None: expected a list of tensors"):
            network.update()
    network = Network()
    network.lists[0] = torch.nn.ParameterList(network.params)
    network.update()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"betas": (0.5, 1.0)}, "betas is (0.5, 1.0)"),
        ({"betas": (-0.1, 0.9)}, "betas is (-0.1, 0.9)"),
        ({"betas": (0.5, math.nan)}, "betas is (0.5, nan)"),
        ({"betas": (0.5, "0.9")}, "betas[1] is '0.9': expected a number"),
        ({"eps": -1.0}, "eps is -1.0: it must be finite and not negative"),
        ({"eps": math.nan}, "eps is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan: it must be finite and not negative"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": torch.ones(())}, "lr is tensor(1.): expected a number"),
        ({"copies": 1}, "copies is 1: expected a list of tensors"),
        ({"copies": [1, None]}, "copies[0] is 1: expected a tensor"),
        ({"loss_scale": 2.0}, "loss_scale is 2.0: expected a tensor"),
        ({"loss_scale": torch.ones(())}, "loss_scale is () on cpu: expected (3,)"),
        ({"loss_scale": torch.ones(3).double()}, "loss_scale is torch.float64"),
        ({"backend": "metal"}, "backend is 'metal'"),
    ],
)
def test_wrong_options_of_adam(options, said):
    with pytest.raises((ValueError, TypeError)) as error:
        Network().update(**options)
    assert said in str(error.value)


class OnAGPU:
    """A tensor as far as the table of addresses looks."""

    is_cuda, shape, dtype, device = True, (4,), torch.float32, torch.device("cuda", 0)

    def data_ptr(self):
        return 4096

    def stride(self):
        return (1,)


def test_a_capture_that_meets_new_tensors_says_what_to_do(monkeypatch):
    """Their addresses would have to be copied from the host, which a capture cannot."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    lists = [[OnAGPU()] for _ in range(4)] + [[None]]
    with pytest.raises(RuntimeError, match=r"call it once before with these very parameters and gradients"):
        sys.modules["kernels.adam_step"]._table(lists, "triton")


def test_the_table_that_a_capture_reads_is_kept_for_good(monkeypatch):
    """A graph replays reads of its memory, long after other networks have pushed it out of the cache."""
    module, capturing = sys.modules["kernels.adam_step"], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(module, "launchers", lambda backend: Launchers([]))
    monkeypatch.setattr(module, "_tables", OrderedDict())
    monkeypatch.setattr(module, "_captured", {})
    lists = [[OnAGPU()] for _ in range(4)] + [[None]]
    table = module._table(lists, "triton")
    assert not module._captured
    capturing.append(True)
    assert module._table(lists, "triton") is table
    assert list(module._captured.values()) == [table]


@dataclass(frozen=True)
class Table:
    tensors: tuple = ("kept alive",)


@dataclass
class Launchers:
    made: list

    def adam_table(self, *lists):
        self.made.append(lists)
        return Table()


def test_the_tables_of_addresses_are_kept_by_all_that_they_say_and_are_few(monkeypatch):
    module, made = sys.modules["kernels.adam_step"], []
    monkeypatch.setattr(module, "launchers", lambda backend: Launchers(made))
    monkeypatch.setattr(module, "_tables", OrderedDict())
    network = Network(copies=False)
    lists = [*network.lists, [None, None]]
    assert module._table(lists, "triton") is module._table(lists, "triton") and len(made) == 1
    assert module._table(lists, "triton").tensors == ()  # the caller's tensors are not kept alive
    module._table(lists, "cuda")
    lists[1] = [g.clone() for g in lists[1]]
    module._table(lists, "triton")
    assert len(made) == 3
    others = [[[t.clone() for t in part] for part in network.lists] for _ in range(20)]
    for other in others:
        module._table([*other, [None, None]], "triton")
    assert len(module._tables) == module.TABLES


def test_a_backend_by_name_that_cannot_run_raises_with_the_cause(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, cause in (("triton", "Triton's kernels need a CUDA device"), ("cuda", "extension")):
        with pytest.raises(BackendError, match=cause):
            Network().update(backend=backend)


def test_the_twin_is_the_op():
    """`kernels.reference.adam`, which has the loss scale too, over lists as the op takes them."""
    network, same = Network(torch.float64), Network(torch.float64)
    table = reference.adam_table(*network.lists, network.copies)
    reference.adam(table, network.step, 1e-2, (0.5, 0.999))
    same.update()
    for ours, theirs in zip(network.lists, same.lists, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(network.copies[0], same.copies[0]) and network.step == same.step == 6
