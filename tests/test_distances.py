"""The measures of samples on clouds and pictures whose distances are known, and the classifier behind the features."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.samples import distances
from bench.samples.distances import (
    alikeness,
    features,
    frechet,
    ms_ssim,
    patch_distance,
    sliced_wasserstein,
    train_classifier,
)
from dcgan.data import open_images
from dcgan.data.digits import FILE


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def digits():
    """512 digits of 16×16, grey, in [-1, 1], and their labels."""
    images = np.array(open_images("digits", 16, progress=False).images[:512])
    with np.load(FILE, allow_pickle=False) as arrays:
        labels = torch.from_numpy(arrays["labels"][:512].astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def noisy(images, deviation):
    return (images + deviation * random(*images.shape, seed=5, dtype=torch.float32)).clamp(-1, 1)


# Sliced Wasserstein


def test_a_shift_of_a_line_is_its_length():
    points = random(50, 1)
    assert sliced_wasserstein(points, points + 0.75) == pytest.approx(0.75, abs=1e-12)
    assert sliced_wasserstein(points, points[torch.randperm(50)]) == 0, "the order of the points is nothing"


def test_a_shift_in_d_dimensions_is_its_length_times_the_mean_cosine():
    size, shift = 10, random(10, seed=1)
    found = sliced_wasserstein(random(200, size), random(200, size) + shift, projections=20_000)
    cosine = math.gamma(size / 2) / (math.sqrt(math.pi) * math.gamma((size + 1) / 2))  # E|θ₁| on the sphere
    assert found == pytest.approx(cosine * shift.norm().item(), rel=0.02)


def test_scaling_a_normal_cloud_moves_it_by_the_mean_of_its_values():
    points = random(4000, 3)
    expected = 0.5 * math.sqrt(2 / math.pi)  # W₁ of N(0, 1) and N(0, 1.5²)
    assert sliced_wasserstein(points, 1.5 * points) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3, 2), (3, 1)), ((3,), (3,))])
def test_clouds_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="accepted are two equal shapes"):
        sliced_wasserstein(*(torch.zeros(shape) for shape in shapes))


def test_the_pyramid_adds_up_to_the_picture():
    images = random(2, 3, 64, 64)
    levels = distances.pyramid(images)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    whole = levels[-1]
    for level in levels[-2::-1]:
        whole = F.interpolate(whole, scale_factor=2, mode="bilinear", align_corners=False) + level
    assert torch.allclose(whole, images, atol=1e-12)


def test_patches_are_windows_of_their_own_picture():
    images = random(5, 2, 16, 16)
    found = distances.patches(images, seed=3).reshape(5, -1, 2, 7, 7)
    for image, some in zip(images, found, strict=True):
        windows = image.unfold(1, 7, 1).unfold(2, 7, 1).permute(1, 2, 0, 3, 4).reshape(-1, 2, 7, 7)
        assert all(any(torch.equal(patch, window) for window in windows) for patch in some)


def test_patch_distance_is_zero_for_the_same_and_grows_with_noise(digits):
    images, _ = digits
    found = [patch_distance(images, noisy(images, deviation)) for deviation in (0, 0.1, 0.3)]
    assert found[0] == 0 and found[0] < found[1] < found[2]
    halves = patch_distance(images[:256], images[256:])
    assert halves < patch_distance(images[:256], images[:1].repeat(256, 1, 1, 1)), "one picture again and again"
    assert halves < patch_distance(images[:256], images[256:] * 0.8), "a shift in contrast"


# Fréchet


def test_frechet_of_gaussians_with_known_moments():
    points = random(300, 3)
    points = points - points.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(points.T)), points.T, upper=False).T
    scales, shift = torch.tensor([2.0, 0.5, 3.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    expected = ((scales - 1) ** 2).sum() + (shift**2).sum()
    assert frechet(white, white * scales + shift) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet(white * scales + shift, white) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet(points, points) == pytest.approx(0, abs=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    a, b = random(40, 4) @ random(4, 4, seed=1), random(60, 4, seed=2) @ random(4, 4, seed=3)
    product = torch.cov(a.T) @ torch.cov(b.T)
    root = torch.linalg.eigvals(product).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_of_fewer_points_than_dimensions_and_of_one():
    few = random(3, 8)
    assert frechet(few, few) == pytest.approx(0, abs=1e-6) and frechet(few, few + 1) == pytest.approx(8, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        frechet(few[:1], few)
    with pytest.raises(ValueError, match=r"b \(3, 4\): accepted"):
        frechet(few, few[:, :4])


# MS-SSIM


def test_equal_pictures_are_alike_and_unrelated_ones_are_not():
    a, b = random(4, 3, 64, 64, dtype=torch.float32), random(4, 3, 64, 64, seed=1, dtype=torch.float32)
    assert torch.allclose(ms_ssim(a, a), torch.ones(4)) and (ms_ssim(a, b) < 0.2).all()
    assert torch.equal(ms_ssim(a, b), ms_ssim(b, a))
    found = [ms_ssim(a, a + deviation * b).mean().item() for deviation in (0.1, 0.3, 1.0)]
    assert found == sorted(found, reverse=True)


def test_flat_pictures_differ_by_their_brightness_alone():
    x, y = 0.5, 0.1
    a, b = torch.full((1, 1, 16, 16), x), torch.full((1, 1, 16, 16), y)
    c1 = (0.01 * 2) ** 2
    assert ms_ssim(a, b).item() == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1), rel=1e-3)


@pytest.mark.parametrize(("size", "scales"), [(16, 1), (28, 2), (32, 2), (64, 3), (128, 4), (256, 5)])
def test_as_many_scales_as_the_window_fits_into(size, scales, monkeypatch):
    pooled = []
    pool = F.avg_pool2d
    monkeypatch.setattr(F, "avg_pool2d", lambda x, n: pooled.append(x.shape[-1]) or pool(x, n))
    ms_ssim(torch.zeros(1, 1, size, size), torch.zeros(1, 1, size, size))
    assert pooled[::2] == [size >> scale for scale in range(scales)] and pooled[-1] >= 11


def test_pictures_below_the_window_are_refused():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ms_ssim(torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10))
    with pytest.raises(ValueError, match="two pictures"):
        alikeness(torch.zeros(1, 1, 16, 16))


def test_a_collapse_makes_pictures_alike(digits):
    images, _ = digits
    found = [alikeness(images[torch.arange(512) % count]) for count in (512, 20, 4, 2, 1)]
    assert found[0] < found[1] < found[2] < found[3] < found[4] == pytest.approx(1, abs=1e-5)


# The classifier


def test_it_learns_the_digits_and_its_features_see_noise_and_collapse(digits):
    images, labels = digits
    model, accuracy = train_classifier(images, labels, epochs=12)
    assert accuracy > 0.7 and not model.training
    again, _ = train_classifier(images, labels, epochs=12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    seen = features(model, images)
    assert seen.shape == (512, 64)
    found = [frechet(seen, features(model, noisy(images, deviation))) for deviation in (0, 0.1, 0.3, 0.6)]
    assert found[0] == pytest.approx(0, abs=1e-6) and found == sorted(found)
    halves = frechet(seen[:256], seen[256:])
    assert halves < frechet(seen[:256], seen[labels == 3]), "one digit alone"


def test_without_labels_it_learns_which_way_up_pictures_are(digits):
    images, _ = digits
    turned, which = distances.rotated(images[:3])
    assert torch.equal(turned[3:6], torch.rot90(images[:3], 1, (2, 3))) and which.bincount().tolist() == [3, 3, 3, 3]
    _, accuracy = train_classifier(images, None, epochs=4)
    assert accuracy > 0.5
