"""Downloads, against a server of this machine."""

import gzip
import hashlib
import http.server
import struct
import sys
import threading

import numpy as np
import pytest

from dcgan.data import idx, named, open_images
from dcgan.errors import InputError

FILE = "train-images-idx3-ubyte.gz"
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 1), dtype=np.uint8)
CONTENT = gzip.compress(struct.pack(">4I", 0x803, 9, 28, 28) + IMAGES.tobytes(), mtime=0)


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `answers`, (status, bytes); the last is repeated."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = [(200, CONTENT)], 0
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = self.server.answers
        status, content = answers[min(self.server.requests, len(answers) - 1)]
        self.server.requests += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def mnist(tmp_path, monkeypatch, server):
    """`mnist` of two mirrors: the server, and one that is not there. One retry."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(named, "RETRIES", 1)
    digest = hashlib.sha256(CONTENT).hexdigest()
    mirrors = ("http://127.0.0.1:1/", server.address)
    monkeypatch.setitem(named.DOWNLOADS, "mnist", named.Download(FILE, digest, mirrors[::-1], idx.open_idx))
    return tmp_path / "xdg" / "dcgan" / "mnist" / FILE


def test_a_download_is_made_once(mnist, server, capfd):
    for _ in range(2):
        result = open_images("mnist", 28, progress=False)
        np.testing.assert_array_equal(result.images, IMAGES)
        assert (result.name, result.source) == ("mnist", "mnist")
    assert server.requests == 1 and mnist.read_bytes() == CONTENT
    assert capfd.readouterr().err == ""


def test_a_damaged_download_is_made_again(mnist, server):
    open_images("mnist", 28)
    mnist.write_bytes(CONTENT[:-1])
    np.testing.assert_array_equal(open_images("mnist", 28).images, IMAGES)
    assert server.requests == 2 and mnist.read_bytes() == CONTENT


@pytest.mark.parametrize("first", [(503, b""), (200, CONTENT[:-7]), (200, b"?" * len(CONTENT))])
def test_a_second_attempt(server, first):
    """After a server's error, a connection that broke off, and other bytes than the checksum promises."""
    server.answers = [first, (200, CONTENT)]
    np.testing.assert_array_equal(open_images("mnist", 28).images, IMAGES)
    assert server.requests == 2


def test_a_second_mirror(server, monkeypatch):
    monkeypatch.setattr(named, "RETRIES", 0)
    wanted = named.DOWNLOADS["mnist"]
    turned = named.Download(wanted.file, wanted.sha256, wanted.mirrors[::-1], wanted.open)
    monkeypatch.setitem(named.DOWNLOADS, "mnist", turned)
    np.testing.assert_array_equal(open_images("mnist", 28).images, IMAGES)


@pytest.mark.parametrize(
    "answer, why", [((404, b""), "404"), ((200, b"?" * len(CONTENT)), "does not match"), (None, "refused")]
)
def test_no_mirror_helps(mnist, server, monkeypatch, answer, why):
    """One line that names the set, each mirror's failure and what to do; nothing is left in the cache."""
    monkeypatch.setattr(named, "RETRIES", 0)
    server.answers = [answer]
    if answer is None:
        server.server_close()
    with pytest.raises(InputError) as caught:
        open_images("mnist", 28, progress=False)
    message = str(caught.value)
    assert message.startswith("--data mnist: cannot be downloaded (127.0.0.1:") and message.isprintable()
    assert message.count("(") == message.count(")") and len(message) < 500
    assert why in message and "refused" in message and f"give a folder with {FILE} in it" in message
    assert not [path for path in mnist.parent.glob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"--data mnist: cannot be stored .*set XDG_CACHE_HOME"):
        open_images("mnist", 28)


def test_without_pooch(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match="pip install pooch"):
        open_images("mnist", 28)


def test_the_table():
    assert sorted(named.DOWNLOADS) == ["cifar10", "fashion-mnist", "mnist"]
    for wanted in named.DOWNLOADS.values():
        assert len(bytes.fromhex(wanted.sha256)) == 32 and len(wanted.mirrors) >= 2
        assert all(mirror.endswith("/") for mirror in wanted.mirrors)
