"""Runs of the main job, as the tests start and compare them."""

import json

import torch

from dcgan import checkpoint as checkpoints
from dcgan import train
from dcgan.errors import run_command

SMALL = "--data digits --image-size 16 --batch-size 128 --nz 8 --ngf 4 --ndf 4 --device cpu".split()
EVERY = "--log-every 2 --sample-every 5 --checkpoint-every 4".split()


def run(*arguments, **options):
    """The command in this process; its exit code."""
    return run_command(lambda: train.main([*map(str, arguments)], **options))


def metrics(folder):
    """The lines of metrics.jsonl without what a clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines]


def assert_equal(a, b, where=""):
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Weights, optimisers, average, noise, accumulators, metrics and samples: bit for bit."""
    ends = [checkpoints.newest(folder / "checkpoints")[0] for folder in (a, b)]
    for end in ends:
        del end.state["seconds"]
    assert ends[0].step == ends[1].step
    assert_equal(ends[0].models, ends[1].models, "models")
    assert_equal(ends[0].state, ends[1].state, "state")
    assert metrics(a) == metrics(b)
    names = sorted(p.name for p in (a / "samples").iterdir())
    assert names == sorted(p.name for p in (b / "samples").iterdir())
    assert all((a / "samples" / n).read_bytes() == (b / "samples" / n).read_bytes() for n in names)
