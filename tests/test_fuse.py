"""`kernels.fuse`: fused layers inside anyone's model."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import kernels


def sequential():
    return nn.Sequential(
        *(nn.ConvTranspose2d(5, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)),
        *(nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)),
        *(nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 3, 4, 2, 1, bias=False), nn.Tanh(), nn.Dropout(0.0)),
    )  # fmt: skip


def test_fuse_changes_neither_names_nor_numbers():
    torch.manual_seed(0)
    model, same = sequential(), sequential()
    same.load_state_dict(model.state_dict())
    report = kernels.fuse(model)
    assert report.fused == ("0", "3", "8") and report.left == {"6": "it has a bias"}
    assert list(model.state_dict()) == list(same.state_dict())
    z = torch.randn(3, 5, 1, 1)
    for _ in range(2):
        ours, theirs = model(z), same(z)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        ours.sum().backward(), theirs.sum().backward()
        for a, b in zip(model.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for a, b in zip(model.buffers(), same.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.eval()(z), same.eval()(z), rtol=1e-5, atol=1e-6)


def test_fuse_says_what_it_leaves_and_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.alone = nn.Conv2d(3, 3, 4, 2, 1, bias=False)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 4, 2, 1, bias=False, groups=3),
                nn.Conv2d(6, 6, 3, 1, 1, bias=False, dilation=2),
                nn.Conv2d(6, 6, 4, 2, 1, bias=False, padding_mode="reflect"),
                nn.Conv2d(6, 6, (4, 2), 2, 1, bias=False),
                nn.Conv2d(6, 6, 4, 2, 1, bias=False),
                nn.BatchNorm2d(6, affine=False),
            )

    report = kernels.fuse(Net())
    assert report.fused == ()
    assert {name: reason.split(" is")[0] for name, reason in report.left.items()} == {
        "alone": "it",
        "body.0": "it has 3 groups",
        "body.1": "its dilation",
        "body.2": "its padding mode",
        "body.3": "its kernel_size differs between the axes",
        "body.4": "its batch norm has no weight and bias",
    }


def test_bn_groups_give_real_and_fake_their_own_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
    real, fake = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8) * 3 + 1
    expected = torch.cat([model(real), model(fake)])
    kernels.fuse(model)
    model.bn_groups = 2
    torch.testing.assert_close(model(torch.cat([real, fake])), expected, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 4


def test_bn_groups_are_kept_where_the_children_run_as_they_are():
    """Behind a convolution with a bias, and on an image that is not square."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
    )
    real, fake = torch.randn(4, 3, 8, 6), torch.randn(4, 3, 8, 6) * 3 + 1
    expected = torch.cat([model(real), model(fake)])
    kernels.fuse(model)
    model.bn_groups = 2
    torch.testing.assert_close(model(torch.cat([real, fake])), expected, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == model[4].num_batches_tracked == 4
    with pytest.raises(ValueError, match="bn_groups is 2: it must divide the batch of 3"):
        model(real[:3])
    assert model.eval()(real[:3]).shape[0] == 3


# Children that do more than their class


def block(act=None):
    return nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU() if act is None else act)


def trained(model, x, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def with_warnings_off(change):
    """The older functions are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change()


CHANGES = {
    "spectral_norm": lambda m: with_warnings_off(lambda: spectral_norm(m[0])),
    "weight_norm": lambda m: with_warnings_off(lambda: weight_norm(m[0])),
    "prune": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "prune of batch norm": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
    "parametrized spectral_norm": lambda m: parametrizations.spectral_norm(m[0]),
    "parametrized weight_norm": lambda m: parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_makes_a_weight_anew_trains_as_it_does_unfused(name, late):
    states = []
    for fused in (False, True):
        torch.manual_seed(0)
        model, x = block(), torch.randn(4, 3, 8, 8)
        if fused and late:
            kernels.fuse(model)
        CHANGES[name](model)
        if fused and not late:
            report = kernels.fuse(model)
            part = "its batch norm" if "batch" in name else "it"
            assert report == (((("0",), {})) if "parametrized" in name else ((), {"0": f"{part} has a hook"}))
        states.append(trained(model, x))
    assert states[0].keys() == states[1].keys()
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def counted(hooks):
    def hook(module, *_):
        hooks.append(type(module).__name__)

    return hook


@pytest.mark.parametrize("child", [0, 1, 2])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_fire_whenever_they_were_added(child, register):
    hooks, model, x = [], block(), torch.randn(2, 3, 8, 8, requires_grad=True)
    kernels.fuse(model)
    handle = getattr(model[child], register)(counted(hooks))
    model(x).sum().backward()
    assert hooks == [type(model[child]).__name__]
    (reason,) = kernels.fuse(model).left.values()
    assert reason.endswith(" has a hook")
    handle.remove()
    assert kernels.fuse(model).fused == ("0",)


def test_a_forward_of_a_child_s_own_is_run():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    for child, own in ((0, Doubled(3, 4, 4, 2, 1, bias=False)), (1, Shifted(4))):
        model = block()
        model[child] = own
        expected = model.train()(x)
        report = kernels.fuse(model)
        assert f"is a {type(own).__name__}, which may compute something else" in report.left["0"]
        torch.testing.assert_close(model(x), expected)
    model = block()
    model[0].forward = lambda x: torch.ones(2, 4, 4, 4)
    assert kernels.fuse(model).left == {"0": "it has a forward of its own"}
    assert not model(x).any()


@pytest.mark.parametrize("name", ["nothing", "prune", "parametrized spectral_norm"])
def test_a_fused_sequential_compiles_without_graph_breaks(name):
    torch.manual_seed(0)
    model, x = block(), torch.randn(2, 3, 8, 8)
    CHANGES.get(name, kernels.fuse)(model)
    kernels.fuse(model.eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(compiled(x), model(x))


# Input that the ops do not take


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 3, 8, 6), id="not square"),
        pytest.param((3, 8, 8), id="unbatched"),
        pytest.param((0, 3, 8, 8), id="an empty batch"),
    ],
)
def test_what_worked_before_fuse_works_behind_it(shape):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 3, 1, 1, bias=False), nn.Tanh()
    )
    x = torch.randn(shape)
    expected = model(x)
    assert kernels.fuse(model).fused == ("0", "2")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_a_slope_that_the_ops_do_not_take_is_left():
    x = torch.randn(2, 3, 8, 8)
    for slope in (-0.5, 1.5, float("nan")):
        model = block(nn.LeakyReLU(slope))
        expected = model(x)
        left = kernels.fuse(model).left
        assert left == {"0": f"its activation's negative_slope is {slope}: accepted are 0 to 1"}
        torch.testing.assert_close(model(x), expected, equal_nan=True)


def test_an_activation_that_stands_twice_is_seen_twice():
    act = nn.LeakyReLU(2.0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1, bias=False), act, nn.Conv2d(3, 3, 3, 1, 1, bias=False), act)
    assert list(kernels.fuse(model).left) == ["0", "2"]


def test_a_sequential_takes_what_its_first_child_takes():
    class Pick(nn.Module):
        def forward(self, pair):
            return pair[1]

    model = nn.Sequential(Pick(), *block())
    kernels.fuse(model)
    assert model((None, torch.randn(2, 3, 8, 8))).shape == (2, 4, 4, 4)


def test_statistics_that_were_taken_away_are_the_batchs():
    """`running_mean = None`: plain batch norm then takes the batch's in evaluation too."""
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8)).eval()
    model[1].running_mean = model[1].running_var = None
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert "0" in kernels.fuse(model).left
    assert torch.equal(model(x), expected)


def test_groups_of_a_batch_norm_behind_a_flatten():
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 1, 0, bias=False), nn.Flatten(), nn.BatchNorm1d(8))
    kernels.fuse(model)
    x = torch.randn(8, 3, 8, 8)
    expected = torch.cat([model(part) for part in x.chunk(2)])
    model.bn_groups = 2
    torch.testing.assert_close(model(x), expected)


def test_a_sequential_with_a_forward_of_its_own_is_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.ReLU())
    model.forward = lambda x: x * 0
    report = kernels.fuse(model)
    assert report.fused == () and "forward of its own" in report.left["0"]


def test_shapes_alone_on_meta():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to("meta")
    kernels.fuse(model)
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 8, 4, 4)
