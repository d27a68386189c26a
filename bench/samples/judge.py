"""What generated pictures are measured against, and when two groups of runs differ by more than their seeds do."""

import math
import re
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from bench.samples.distances import alikeness, features, frechet, patch_distance, train_classifier
from dcgan.data import ImageSet
from dcgan.data.digits import FILE as DIGITS
from dcgan.data.pictures import PictureSource
from dcgan.data.source import shown
from dcgan.errors import InputError

MEASURES = {
    "patch_distance": "sliced Wasserstein, patches",
    "frechet": "Fréchet, features",
    "alikeness": "MS-SSIM of pairs",
}
"""Of all three, more is worse."""

SAMPLES = 5000
SEED = 17  # of the samples, the split and the classifier: the same for all runs

T_975 = {2: 4.303, 3: 2.776, 4: 2.447, 5: 2.306, 6: 2.228, 7: 2.179, 8: 2.145, 9: 2.120, 10: 2.101}
"""97.5 % quantile of Student's t with 2·seeds − 2 degrees of freedom, by seeds."""


def labels_of(images: ImageSet) -> Tensor | None:
    """The class of each picture: the digits' own, or the folder each picture of a set lies in; None if neither."""
    if images.source == "digits":
        with np.load(DIGITS, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["labels"].astype(np.int64))
    path = Path(images.source)
    if not path.is_dir() and path.suffix.lower() != ".zip":
        return None
    try:
        names = list(PictureSource(path).pictures)
    except InputError:  # a folder of another format
        return None
    left_out = {line[: at.start()] for line in images.skipped for at in re.finditer(": ", line)}  # "name: why: why"
    folders = [name.rpartition("/")[0] for name in names if shown(name) not in left_out]
    if len(folders) != len(images.images) or len(set(folders)) < 2:
        return None
    classes = {name: i for i, name in enumerate(sorted(set(folders)))}
    return torch.tensor([classes[name] for name in folders])


class Judge:
    """Real pictures and what generated ones are measured against.

    Args:
        images: as in `Study`.
        device: where to compute.
        samples: how many pictures are compared, at most as many as there are real ones.
        epochs: of the classifier.
    """

    def __init__(self, images: ImageSet, device: torch.device, samples: int = SAMPLES, epochs: int = 10):
        chosen = torch.randperm(len(images.images), generator=torch.Generator().manual_seed(SEED)).numpy()
        every = torch.from_numpy(np.asarray(images.images)[chosen]).permute(0, 3, 1, 2)
        every = every.to(device, torch.float32).mul_(2 / 255).sub_(1).contiguous()
        labels = labels_of(images)
        self.labelled = labels is not None
        targets = labels[torch.from_numpy(chosen)] if self.labelled else None
        self.classifier, self.accuracy = train_classifier(every, targets, epochs, SEED)
        self.real = every[:samples]
        self.real_features = features(self.classifier, self.real)

    def __call__(self, fake: Tensor) -> dict[str, float]:
        """`MEASURES` of as many generated pictures as `real` has."""
        return {
            "patch_distance": patch_distance(self.real, fake, SEED),
            "frechet": frechet(self.real_features, features(self.classifier, fake)),
            "alikeness": alikeness(fake, seed=SEED),
        }

    def halves(self) -> dict[str, float]:
        """The same of real pictures: one half against the other, and how alike real ones are."""
        half = len(self.real) // 2
        return {
            "patch_distance": patch_distance(self.real[:half], self.real[half : 2 * half], SEED),
            "frechet": frechet(self.real_features[:half], self.real_features[half:]),
            "alikeness": alikeness(self.real, seed=SEED),
        }


def compare(fused: list[float], eager: list[float]) -> dict[str, float | str | None]:
    """Two groups of runs, as many of each, of a measure of which more is worse.

    Returns:
        `fused`, `eager`: their means. `spread`: standard deviation of a single run about its group's mean, pooled.
        `difference_spreads`: (fused − eager) / spread. `allowed_spreads`: how large that may be before two such groups
        of one distribution would differ so in one of twenty cases: t·√(2/n). `verdict`: inside, worse or better.
        The last four are null for a single seed.
    """
    n, means = len(fused), (mean(fused), mean(eager))
    found: dict[str, float | str | None] = {"fused": means[0], "eager": means[1]}
    if n < 2:
        return found | dict.fromkeys(("spread", "difference_spreads", "allowed_spreads", "verdict"))
    squares = ((value - centre) ** 2 for group, centre in zip((fused, eager), means, strict=True) for value in group)
    spread = math.sqrt(sum(squares) / (2 * n - 2))
    allowed = T_975[n] * math.sqrt(2 / n)
    difference = means[0] - means[1]
    # Runs that agree to the last bit have no spread: then any difference is outside. NaN is worse.
    apart = difference / spread if spread else math.copysign(math.inf, difference) if difference else 0.0
    verdict = "inside" if abs(apart) <= allowed else "better" if apart < 0 else "worse"
    return found | {"spread": spread, "difference_spreads": apart, "allowed_spreads": allowed, "verdict": verdict}


def table(rows: list[dict]) -> str:
    """The comparisons as Markdown."""
    head = ("step", "measure", "eager fp32", "fused bf16", "spread of a run", "difference, in spreads", "")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        if "measure" not in row:
            continue
        cells = [f"{row['step']:,}", MEASURES[row["measure"]]]
        figures = [row.get(key) for key in ("eager", "fused", "spread")]
        cells += ["–" if value is None else f"{value:.3g}" for value in figures]
        apart, allowed = row.get("difference_spreads"), row.get("allowed_spreads")
        cells += ["–" if apart is None else f"{apart:+.2f} of ±{allowed:.2f}", row.get("verdict") or row.get("why", "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
