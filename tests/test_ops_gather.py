"""`gather_images` against plain PyTorch, through every way of running it that needs no GPU."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.dispatch import BackendError


def dataset(count=6, size=5, into=3, **changes):
    g = torch.Generator().manual_seed(0)
    fine = {
        "rows": torch.randint(0, 256, (count, size, size, into), generator=g, dtype=torch.uint8),
        "permutation": torch.randperm(count, generator=g),
        "cursor": torch.tensor(0),
        "batch": 4,
    }
    return fine | changes


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_is_the_permuted_scaled_pictures(flipped, channels, dtype):
    flip = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.uint8) if flipped else None
    d = dataset(flip=flip, dtype=dtype, channels=channels)
    got = [kernels.gather_images(**d) for _ in range(2)]
    assert d["cursor"] == 8
    for i, image in enumerate(torch.cat(got)):
        place = i % 6
        expected = d["rows"][d["permutation"][place]].double() / 127.5 - 1
        if flipped and flip[place]:
            expected = expected.flip(1)
        expected = F.pad(expected.permute(2, 0, 1), (0, 0, 0, 0, 0, (channels or 3) - 3))
        torch.testing.assert_close(image.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert got[0].dtype == dtype and got[0].is_contiguous(memory_format=torch.channels_last)


def test_opcheck_of_gather():
    d = dataset()
    flip = torch.ones(6, dtype=torch.uint8)
    for mirrored in (None, flip):
        arguments = (d["rows"], d["permutation"], d["cursor"], 4, mirrored, torch.bfloat16, 4, "eager")
        torch.library.opcheck(torch.ops.dcgan_kernels.gather_images.default, arguments)


def test_gather_compiles_without_graph_breaks():
    plain, compiled = dataset(), dataset()
    run = torch.compile(lambda **d: kernels.gather_images(**d), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(run(**compiled), kernels.gather_images(**plain))
    assert compiled["cursor"] == plain["cursor"] == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": torch.zeros(2, 4, 4, 3)}, "rows is torch.float32: expected uint8"),
        ({"rows": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "rows has shape (2, 4, 4)"),
        ({"rows": torch.zeros(0, 4, 4, 3, dtype=torch.uint8)}, "rows has shape (0, 4, 4, 3)"),
        ({"rows": torch.zeros(2, 3, 4, 4, dtype=torch.uint8).permute(0, 2, 3, 1)}, "strides (48, 4, 1, 16)"),
        ({"permutation": torch.zeros(6)}, "permutation is torch.float32: expected torch.int64"),
        ({"permutation": torch.zeros(0, dtype=torch.int64)}, "permutation has shape (0,)"),
        ({"permutation": torch.zeros(6, dtype=torch.int64, device="meta")}, "on meta: expected contiguous (6,) on cpu"),
        ({"cursor": torch.tensor(0, dtype=torch.int32)}, "cursor is torch.int32"),
        ({"cursor": torch.zeros(1, dtype=torch.int64)}, "cursor has shape (1,)"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 2.0}, "batch is 2.0: expected a whole number"),
        ({"batch": "4"}, "batch is '4': expected a whole number"),
        ({"channels": 4.0}, "channels is 4.0: expected a whole number"),
        ({"flip": True}, "flip is True: expected a tensor"),
        ({"flip": torch.zeros(4, dtype=torch.uint8)}, "flip has shape (4,)"),
        ({"flip": torch.zeros(6, dtype=torch.bool)}, "flip is torch.bool"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"channels": 2}, "channels is 2: rows have 3"),
    ],
)
def test_wrong_input_of_gather(changes, said):
    with pytest.raises((ValueError, TypeError)) as error:
        kernels.gather_images(**dataset(**changes))
    assert said in str(error.value)


def test_a_backend_by_name_that_cannot_run_raises_with_the_cause(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, cause in (("triton", "Triton's kernels need a CUDA device"), ("cuda", "extension")):
        with pytest.raises(BackendError, match=cause):
            kernels.gather_images(**dataset(), backend=backend)
