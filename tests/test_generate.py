"""Sampling: from a run, from the example's files, the same whatever the batch."""

import numpy as np
import pytest
import torch
from PIL import Image

import dcgan
from dcgan import generate, train
from dcgan.arch import Arch
from dcgan.errors import InputError, run_command
from dcgan.model import Discriminator, Generator


def run(*arguments):
    return run_command(lambda: generate.main([*map(str, arguments), "--device", "cpu"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "r"
    small = "--image-size 16 --batch-size 64 --nz 8 --ngf 4 --ndf 4 --steps 12 --ema 0.9 --device cpu"
    assert train.main([*small.split(), "--out", str(folder)]) == 0
    return folder


def test_a_grid_from_a_run(trained, tmp_path):
    for name in ("a.png", "b.png"):
        assert run(trained, "--n", 9, "--seed", 1, "--out", tmp_path / "sub" / name) == 0
    assert Image.open(tmp_path / "sub" / "a.png").size == (3 * 18 - 2, 3 * 18 - 2)
    assert (tmp_path / "sub" / "a.png").read_bytes() == (tmp_path / "sub" / "b.png").read_bytes()
    assert run(trained, "--n", 9, "--seed", 10**30, "--out", tmp_path / "c.png") == 0
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "sub" / "a.png").read_bytes()


def test_separate_files(trained, tmp_path):
    assert run(trained, "--n", 3, "--out", tmp_path / "many") == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(tmp_path / "many" / "000000.png").size == (16, 16)


def test_an_array_holds_the_pictures_of_the_folder(trained, tmp_path):
    """Over several pieces, and in another precision nearly the same ones."""
    assert run(trained, "--n", 150, "--out", tmp_path / "many") == 0
    for precision in ("fp32", "bf16"):
        path = tmp_path / "sub" / f"{precision}.npy"
        assert run(trained, "--n", 150, "--precision", precision, "--out", path) == 0
    exact, rounded = (np.load(tmp_path / "sub" / f"{precision}.npy").astype(int) for precision in ("fp32", "bf16"))
    assert exact.shape == (150, 16, 16, 1)
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["bf16.npy", "fp32.npy"]
    for i in (0, 63, 64, 149):
        assert (np.array(Image.open(tmp_path / "many" / f"{i:06d}.png")) == exact[i, :, :, 0]).all()
    assert 0 < np.abs(exact - rounded).mean() < 2


def test_an_array_that_cannot_be_finished_leaves_nothing(trained, tmp_path, monkeypatch):
    (tmp_path / "old.npy").write_bytes(b"as it was")

    def full(piece):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate, "to_uint8", full)
    assert run(trained, "--n", 3, "--out", tmp_path / "old.npy") == 2
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old.npy", b"as it was")]


@pytest.mark.parametrize(
    "arguments", [("--precision", "tf32"), ("--precision", "bf16", "--batch-stats"), ("--out", "a.npz")]
)
def test_what_sampling_cannot_do_is_refused(trained, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert run(trained, "--n", 3, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_sampler_of_a_run(trained):
    z = torch.randn(5, 8)
    sampler = dcgan.sampler(trained, precision="fp32")
    with torch.no_grad():
        torch.testing.assert_close(sampler(z), dcgan.load(trained)(z), rtol=0, atol=1e-5)


def sampled(generator, n):
    return torch.cat(list(generate.sample(generator, n, seed=0)))


def test_a_picture_does_not_depend_on_its_batch_mates(trained):
    generator = dcgan.load(trained)
    many = sampled(generator, 130)
    assert len(many) == 130
    for n in (1, 65, 67):  # torch.randn of fewer numbers than a multiple of 16 draws its last ones otherwise
        torch.testing.assert_close(sampled(generator, n), many[:n], rtol=0, atol=1e-6)
    generator.train()
    few, many = sampled(generator, 2), sampled(generator, 70)
    assert (few[0] - many[0]).abs().max() > 1e-3


def test_the_average_and_the_last_weights_differ(trained, tmp_path):
    z = torch.randn(2, 8)
    average, last = dcgan.load(trained), dcgan.load(trained, ema=False)
    assert not average.training and average.arch == Arch(16, 1, 8, 4, 4)
    assert not torch.equal(average(z), last(z))
    assert run(trained, "--no-ema", "--out", tmp_path / "last.png") == 0
    assert run(trained, "--out", tmp_path / "average.png") == 0
    assert (tmp_path / "last.png").read_bytes() != (tmp_path / "average.png").read_bytes()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("dense", [False, True])
def test_a_state_dict_of_the_example_loads(tmp_path, prefix, dense):
    arch = Arch(32, 3, 5, 3, 3, dense)
    generator = Generator(arch).eval()
    torch.save({prefix + name: value for name, value in generator.state_dict().items()}, tmp_path / "netG.pth")
    loaded = dcgan.load(tmp_path / "netG.pth")
    z = torch.randn(2, 5)
    assert loaded.arch == arch and torch.equal(loaded(z), generator(z))
    assert run(tmp_path / "netG.pth", "--n", 4, "--out", tmp_path / "grid.png") == 0
    assert np.array(Image.open(tmp_path / "grid.png")).shape == (66, 66, 3)


class Payload:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (str(self.sentinel), "w"))


def test_a_hostile_file_never_executes(tmp_path, capsys):
    torch.save({"main.0.weight": Payload(tmp_path / "executed")}, tmp_path / "netG.pth")
    assert run(tmp_path / "netG.pth", "--out", tmp_path / "grid.png") == 2
    assert not (tmp_path / "executed").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


def write_strange(folder):
    """Files that are no generator, by name."""
    torch.save(Discriminator(Arch(16, 1, 8, 4, 4)).state_dict(), folder / "netD.pth")
    torch.save({"layers": [1, 2]}, folder / "list.pth")
    torch.save({"conv.weight": torch.zeros(2)}, folder / "other.pth")
    (folder / "text.pth").write_text("hello")
    (folder / "text.safetensors").write_text("hello")
    torch.save({1: torch.zeros(2)}, folder / "numbers.pth")
    torch.save({"main.0.weight": torch.zeros(2, dtype=torch.complex64)}, folder / "complex.pth")
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    "name",
    [
        "netD.pth",
        "list.pth",
        "other.pth",
        "numbers.pth",
        "complex.pth",
        "text.pth",
        "text.safetensors",
        "empty",
        "none",
        "n" * 300,
    ],
)
def test_what_is_no_generator_is_one_line_and_exit_code_2(tmp_path, capsys, name):
    write_strange(tmp_path)
    assert run(tmp_path / name, "--out", tmp_path / "grid.png") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(tmp_path / name) in lines[0]
    assert not (tmp_path / "grid.png").exists()
    with pytest.raises(InputError):
        dcgan.load(tmp_path / name)


def test_wrong_arguments(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    grid = tmp_path / "grid.png"
    for arguments, said in (
        (("--n", 0, "--out", grid), "--n"),
        (("--n", 20_000, "--out", grid), "--n 20000"),
        (("--out", tmp_path / "file" / "x"), "--out"),
        (("--out", ""), "--out ''"),
        (("--out", tmp_path / "x.jpg"), "written as .png"),
        (("--out", tmp_path / ("x" * 300)), "--out"),
    ):
        assert run(trained, *arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0]
