"""`kernels.fuse`: fused layers inside anyone's model."""

import torch
from torch import nn

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
