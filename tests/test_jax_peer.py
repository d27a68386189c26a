"""The JAX peer: what travels between the processes, what becomes of a child that fails, and the step where JAX is."""

import importlib.util
import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from bench.peers import jax_peer, jax_step
from bench.verify import oracle, trained
from dcgan.arch import Arch
from dcgan.model import Discriminator, Generator
from dcgan.step import ReferenceStep, adam

ARCH, CPU = Arch(image_size=16, nz=8, ngf=8, ndf=8), torch.device("cpu")
HAS_JAX = importlib.util.find_spec("jax") is not None


@pytest.fixture(scope="module")
def expected():
    return oracle(ARCH, 4, CPU)


def layers_of(layers):
    return [asdict(layer) for layer in layers]


@pytest.mark.parametrize("arch", [ARCH, Arch(image_size=28, channels=1, nz=5, ngf=4, ndf=4)], ids=["16", "28"])
def test_state_dicts_survive_the_way_there_and_back(arch):
    for layers, network in ((arch.generator, Generator(arch)), (arch.discriminator, Discriminator(arch))):
        state = {name: value.numpy() for name, value in network.state_dict().items()}
        params, stats = jax_step.from_torch(layers_of(layers), state)
        shapes = [tuple(layer.weight_shape[axis] for axis in (2, 3, 1, 0)) for layer in layers]
        assert [own["weight"].shape for own in params] == shapes
        back = jax_step.to_torch(layers_of(layers), params, stats)
        assert back.keys() == state.keys()
        assert all(np.array_equal(back[name], value) for name, value in state.items())
        assert not any("running" in name for name in jax_step.to_torch(layers_of(layers), params, []))


def test_the_question_is_plain_arrays(expected, tmp_path):
    np.savez(tmp_path / "in.npz", **jax_peer.question(expected, ARCH, "bf16", 3.0))
    with np.load(tmp_path / "in.npz", allow_pickle=False) as file:
        arrays = dict(file)
    settings = json.loads(str(arrays["settings"]))
    assert (settings["precision"], settings["seconds"]) == ("bf16", 3.0)
    assert settings["layers"]["g"][0]["name"] == "G1" and len(settings["layers"]["d"]) == len(ARCH.discriminator)
    assert arrays["real/2"].shape == (4, 3, 16, 16) and arrays["z/2"].dtype == np.float32
    assert {f"start/d/{name}" for name in expected.start[1]} <= arrays.keys()


def answer(expected, lr=2e-4):
    """OUT.npz, by the reference step instead of JAX."""
    networks = Generator(ARCH), Discriminator(ARCH)
    for network, state in zip(networks, expected.start, strict=True):
        network.load_state_dict(state)
    optimizers = tuple(adam(network, lr=lr) for network in networks)
    metrics, _ = trained(ReferenceStep(*networks, *optimizers), networks, optimizers, expected.data[:1])
    arrays = {}
    for key, network, optimizer in zip("gd", networks, optimizers, strict=True):
        for name, parameter in network.named_parameters():
            arrays[f"moments/{key}/{name}"] = optimizer.state[parameter]["exp_avg"].numpy().copy()
    rest, _ = trained(ReferenceStep(*networks, *optimizers), networks, optimizers, expected.data[1:])
    for key, network in zip("gd", networks, strict=True):
        arrays |= {f"end/{key}/{name}": value.numpy() for name, value in network.state_dict().items()}
    return arrays | {"metrics": torch.cat([metrics, rest]).numpy()}


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda arrays: None, None),
        (lambda arrays: arrays["metrics"].__setitem__((0, 0), 9.0), "first"),
        (lambda arrays: arrays["moments/g/main.0.weight"].__imul__(2), "gradient"),
        (lambda arrays: arrays["end/d/main.3.running_mean"].__iadd__(1), "statistics"),
        (lambda arrays: arrays["end/g/main.1.num_batches_tracked"].__iadd__(1), "counts"),
        (lambda arrays: arrays.pop("end/g/main.0.weight"), "cannot be read"),
        (lambda arrays: arrays.update(metrics=np.zeros((2, 5), np.float32)), "cannot be read"),
    ],
    ids=["right", "metrics", "moments", "statistics", "counts", "missing", "short"],
)
def test_what_the_child_says_is_judged(expected, monkeypatch, spoil, why):
    def child(source, target, device, timeout_s):
        arrays = answer(expected)
        spoil(arrays)
        np.savez(target, **arrays)
        return {"p50_ms": 1.0}

    monkeypatch.setattr(jax_peer, "oracle", lambda *_: expected)
    monkeypatch.setattr(jax_peer, "child", child)
    row = jax_peer.run(ARCH, 4, 1.0, CPU, "fp32")
    assert row["ok"] is (why is None) and (row["name"], row["batch"]) == ("jax", 4)
    assert (why in row["why"]) if why else (row["p50_ms"] == 1.0 and row["difference_update"] < 1e-3)


@pytest.mark.parametrize(
    ("script", "seconds", "why"),
    [
        ("exit 3", 5, "exit code 3, it said: nothing"),
        ("echo boom >&2; exit 1", 5, "it said: boom"),
        ("echo not json", 5, "it said"),
        ("echo 17", 5, "it printed 17"),
        ("exec sleep 9", 0.2, "not finished within"),
        ('echo warning; echo \'{"why": "no memory"}\'', 5, "no memory"),
    ],
)
def test_a_child_that_fails_is_a_reason(tmp_path, monkeypatch, script, seconds, why):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert why in jax_peer.child(tmp_path / "in", tmp_path / "out", CPU, seconds)["why"]


def test_without_jax_the_row_says_so(tmp_path, monkeypatch, expected):
    (tmp_path / "jax.py").write_text("raise ImportError('gone')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(jax_peer, "oracle", lambda *_: expected)
    row = jax_peer.run(ARCH, 4, 1.0, CPU)
    assert row["ok"] is None and row["why"] == "JAX is not installed (gone)" and row["name"] == "jax+bf16"


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="precision 'fp16': accepted are fp32, bf16"):
        jax_peer.run(ARCH, 4, 1.0, CPU, "fp16")


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
@pytest.mark.parametrize("precision", jax_peer.PRECISIONS)
def test_the_jax_step_is_the_reference_step(precision):
    row = jax_peer.run(ARCH, 4, 120.0, CPU, precision)  # a busy machine compiles slowly
    assert row["ok"] is True, row
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["images_per_s"] > 0 and row["platform"] == "cpu"
    if precision == "fp32":
        assert row["difference_metrics"] < 1e-4 and row["difference_gradient"] < 1e-4
        assert row["difference_statistics"] < 1e-5 and row["difference_update"] < 1e-2
