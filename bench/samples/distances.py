"""How far generated pictures are from real ones and from each other: three measures, and the classifier one needs.

    patch_distance   sliced Wasserstein distance between 7×7 patches, level by level of a Laplacian pyramid
    frechet          Fréchet distance between Gaussians fitted to features, here of a classifier trained on the spot
    ms_ssim          multi-scale structural similarity of two pictures; its mean over pairs measures how alike they are

Pictures are float (N, C, H, W) in [-1, 1]. Every function is a function of its arguments and a seed.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, PATCHES_AN_IMAGE, PROJECTIONS = 7, 16, 256
COARSEST = 16
WINDOW, SIGMA = 11, 1.5
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, finest first. Source: Wang, Simoncelli, Bovik 2003, section 3.2."""

BATCH = 256


def ascending(values: Tensor) -> Tensor:
    """Each column of (N, D) float32 in order."""
    if values.is_cuda:
        return values.sort(dim=0).values
    # NumPy sorts with AVX-512: (80,000, 64) in 0.20 s, where torch takes 0.99 s
    return torch.from_numpy(np.sort(values.T.contiguous().numpy(), axis=1)).T


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = PROJECTIONS, seed: int = 0) -> float:
    """Mean over random directions of the 1-Wasserstein distance between projections: Σ|sort(a·θ) − sort(b·θ)| / N.

    Args:
        a, b: points (N, D), as many of each.
        projections: how many directions, uniform on the sphere.
        seed: of the directions.

    Raises:
        ValueError: shapes that differ.

    Source: Rabin, Peyré, Delon, Bernot 2011.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a is {tuple(a.shape)}, b {tuple(b.shape)}: accepted are two equal shapes (N, D)")
    random = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(projections, a.shape[1], generator=random), dim=1).to(a)
    total = 0.0
    for some in directions.split(64):
        apart = ascending(a @ some.T) - ascending(b @ some.T)
        total += apart.abs().mean(0).sum().item()
    return total / projections


def pyramid(images: Tensor) -> list[Tensor]:
    """Laplacian pyramid, finest first: each level what its half-sized average does not tell, the last the average."""
    levels = []
    while images.shape[-1] > COARSEST and images.shape[-1] % 2 == 0:
        half = F.avg_pool2d(images, 2)
        levels.append(images - F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False))
        images = half
    return [*levels, images]


def patches(images: Tensor, seed: int = 0) -> Tensor:
    """`PATCHES_AN_IMAGE` random patches of each picture: (N · patches, C · 49); where depends only on the seed."""
    n, channels, height, width = images.shape
    random = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randint(size - PATCH + 1, (n, PATCHES_AN_IMAGE), generator=random).to(images.device)
        for size in (height, width)
    )
    windows = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # a view (N, C, H', W', 7, 7)
    chosen = windows[torch.arange(n, device=images.device)[:, None], :, rows, columns]
    return chosen.reshape(n * PATCHES_AN_IMAGE, channels * PATCH * PATCH)


def patch_distance(real: Tensor, fake: Tensor, seed: int = 0) -> float:
    """Sliced Wasserstein distance of patches, mean over the levels of the pyramid.

    1. Both sets' Laplacian pyramids, down to 16 pixels.
    2. At each level random 7×7 patches, each channel in units of the real patches' mean and deviation there.
    3. `sliced_wasserstein` of the two clouds.

    Args:
        real, fake: as many pictures of each.
        seed: of places and directions.

    Source: Karras, Aila, Laine, Lehtinen 2018, arXiv:1710.10196, section 5; they normalise each set by itself, which
    would hide a shift in colour, and use a Gaussian filter where this takes 2×2 averages.
    """
    distances = []
    for level, (ours, theirs) in enumerate(zip(pyramid(real), pyramid(fake), strict=True)):
        mean = ours.mean((0, 2, 3), keepdim=True)
        deviation = ours.std((0, 2, 3), keepdim=True).clamp(min=1e-4)  # a channel may be constant
        clouds = (patches((images - mean) / deviation, seed + level) for images in (ours, theirs))
        distances.append(sliced_wasserstein(*clouds, seed=seed + level))
    return sum(distances) / len(distances)


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to two clouds: |m₁ − m₂|² + tr(C₁ + C₂ − 2·(C₁C₂)^½), in float64.

    The root's trace is the sum of the roots of the eigenvalues of C₁^½·C₂·C₁^½, which is symmetric.

    Args:
        a, b: points (N, D) and (M, D), at least two of each.

    Raises:
        ValueError: other shapes.

    Source: Dowson, Landau 1982; Heusel et al. 2017, arXiv:1706.08500.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a is {tuple(a.shape)}, b {tuple(b.shape)}: accepted are (N, D) and (M, D), N and M at least 2"
        )
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max((apart + covariance_a.trace() + covariance_b.trace() - 2 * cross).item(), 0.0)


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity of picture pairs: Π cs_j^w_j · ssim_last^w_last, in [0, 1]; 1 for equal ones.

    As many of the five scales as the 11×11 window fits into, their weights scaled to a sum of 1. Negative means of a
    scale count as 0.

    Args:
        a, b: (N, C, H, W) in [-1, 1], H and W at least 11.

    Returns:
        (N,) float32.

    Raises:
        ValueError: other shapes, or pictures smaller than the window.

    Source: Wang, Simoncelli, Bovik 2003.
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < WINDOW:
        got = f"a is {tuple(a.shape)}, b {tuple(b.shape)}"
        raise ValueError(f"{got}: accepted are equal shapes (N, C, H, W) of at least {WINDOW} pixels")
    scales = min(len(WEIGHTS), int(math.log2(min(a.shape[2:]) / WINDOW)) + 1)
    weights = [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]
    place = torch.arange(WINDOW, device=a.device) - WINDOW // 2
    line = torch.exp(-place.square() / (2 * SIGMA**2))
    line = line / line.sum()
    window = torch.outer(line, line).expand(a.shape[1], 1, WINDOW, WINDOW)

    def blurred(maps: Tensor) -> Tensor:
        return F.conv2d(maps, window, groups=maps.shape[1])

    a, b = a.float(), b.float()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # 2: the range of the values
    result = torch.ones(len(a), device=a.device)
    for scale, weight in enumerate(weights):
        mean_a, mean_b = blurred(a), blurred(b)
        var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
        similar = (2 * (blurred(a * b) - mean_a * mean_b) + c2) / (var_a + var_b + c2)
        if scale == scales - 1:
            similar = similar * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        result = result * similar.mean((1, 2, 3)).clamp(min=0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result


def alikeness(images: Tensor, pairs: int = 1000, seed: int = 0) -> float:
    """Mean `ms_ssim` of random pairs of different pictures; it rises as a generator collapses.

    Raises:
        ValueError: fewer than two pictures.

    Source: Odena, Olah, Shlens 2017, arXiv:1610.09585, section 4.2.
    """
    n = len(images)
    if n < 2:
        raise ValueError(f"images is {tuple(images.shape)}: a pair needs two pictures")
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(n, (pairs,), generator=random)
    second = (first + torch.randint(1, n, (pairs,), generator=random)) % n
    parts = zip(first.split(BATCH), second.split(BATCH), strict=True)
    return torch.cat([ms_ssim(images[i], images[j]) for i, j in parts]).mean().item()


class Classifier(nn.Module):
    """A small convnet: convolutions of stride 2 with batch norm down to 4 pixels or fewer, a mean, a linear layer."""

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        layers, width = [], 32
        while size > 4:
            layers += [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
            channels, width, size = width, min(2 * width, 128), size // 2
        self.body, self.head = nn.Sequential(*layers), nn.Linear(channels, classes)

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → (N, D), D at most 128."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def rotated(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture in four orientations, and which: a task for pictures without labels. Source: Gidaris et al. 2018."""
    turned = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


def train_classifier(
    images: Tensor, labels: Tensor | None, epochs: int = 10, seed: int = 0
) -> tuple[Classifier, float]:
    """A classifier of real pictures, in evaluation mode, and its accuracy on the tenth that it was not trained on.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,) whole numbers from 0; None: which way up each picture is (`rotated`).
        epochs: over the nine tenths.
        seed: of weights, order and split.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=random)
    held = max(1, len(images) // 10)
    sets = [(images[i], None if labels is None else labels[i]) for i in (order[held:], order[:held])]
    (pictures, targets), (unseen, truths) = [rotated(x) if y is None else (x, y) for x, y in sets]
    classes = 4 if labels is None else int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], images.shape[-1], classes).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(pictures), generator=random).split(BATCH // 2):
            if len(chosen) > 1:  # batch norm needs two
                optimizer.zero_grad()
                F.cross_entropy(model(pictures[chosen]), targets[chosen].to(images.device)).backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(some).argmax(1) for some in unseen.split(BATCH)])
    return model, (guesses == truths.to(guesses.device)).float().mean().item()


@torch.no_grad()
def features(model: Classifier, images: Tensor) -> Tensor:
    """The classifier's features of `images`: (N, D), a batch at a time."""
    return torch.cat([model.features(some) for some in images.split(BATCH)])
