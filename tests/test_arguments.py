"""What both GPU backends' launchers share: tickets, and an activation that none of them has."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from kernels import arguments
from kernels.arguments import tickets

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A tensor that passes for one on a GPU, whose stream and capture the test sets."""
    state = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(arguments, "_TICKETS", {})
    state.like = SimpleNamespace(device=CPU, is_cuda=True)
    return state


def test_the_launches_of_a_stream_share_them(gpu):
    first = tickets(gpu.like, 3)
    assert tickets(gpu.like, 4096) is first and first.dtype == torch.int32 and not first.any()
    assert len(tickets(gpu.like, 5000)) >= 5000
    gpu.stream = 2
    assert tickets(gpu.like, 3) is not first


def test_those_made_while_capturing_are_the_graphs_own(gpu):
    """Their zeros are written by that graph's replays alone, and their memory goes with it."""
    gpu.capturing = True
    first = tickets(gpu.like, 3)
    assert tickets(gpu.like, 3) is not first
    gpu.capturing = False
    kept = tickets(gpu.like, 3)
    assert kept is not first
    gpu.capturing = True
    assert tickets(gpu.like, 3) is kept, "zero before the capture, and after each launch"


def test_none_are_made_on_meta():
    assert tickets(torch.empty(1, device="meta"), 7).shape == (7,)


@pytest.mark.parametrize("backend", ["_triton", "_cuda", "reference"])
def test_an_activation_that_is_none_is_no_identity(backend):
    if backend == "_triton":
        pytest.importorskip("triton")
    module = importlib.import_module("kernels.reference" if backend == "reference" else f"kernels.{backend}.batch_norm")
    y, state = torch.zeros(2, 2, 2, 8), torch.ones(4, 1, 8)
    with pytest.raises(ValueError, match="gelu"):
        module.apply(y, state, "gelu")
