"""A web server of this machine for tests: what each path answers is said in ANSWERS."""

from __future__ import annotations

import http.server
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from source_files import encode

PNG = encode(Image.new("RGB", (40, 30), (10, 200, 90)), "PNG")


class Site:
    """A running server: its address, and each request that it saw."""

    def __init__(self, scheme: str, port: int) -> None:
        self.scheme, self.port = scheme, port
        self.seen: list[tuple[str, str]] = []  # (Host header, path)
        self.names: list[str | None] = []  # that TLS asked for

    @property
    def host(self) -> str:
        """The entry of image_hosts that allows it."""
        return f"{'' if self.scheme == 'https' else 'http://'}127.0.0.1:{self.port}"

    def url(self, path: str = "ok.png", host: str = "127.0.0.1") -> str:
        """Return the address of a path."""
        return f"{self.scheme}://{host}:{self.port}/{path}"

    def paths(self) -> list[str]:
        """Return what was asked for."""
        return [path for _, path in self.seen]


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[Site]:
    """Run a server, with TLS if it is given a file of its key and certificate."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    site = Site("http" if certificate is None else "https", server.server_port)
    server.site = site  # type: ignore[attr-defined]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.sni_callback = lambda _, name, __: site.names.append(name)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site: Site = self.server.site  # type: ignore[attr-defined]
        site.seen.append((self.headers["Host"], self.path))
        name, _, rest = self.path.lstrip("/").partition("?")
        if name not in ANSWERS:
            self.say(404, b"<html>no such picture</html>")
        else:
            ANSWERS[name](self, rest)

    def log_message(self, *_: Any) -> None:
        pass

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for key, value in {"content_length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def tries(self) -> int:
        """Return how often this path was asked for."""
        return self.server.site.paths().count(self.path)  # type: ignore[attr-defined]


def _endless(answer: _Answer, rest: str) -> None:
    answer.send_response(200)
    answer.end_headers()
    while True:
        answer.wfile.write(b"\0" * 65536)


def _drip(answer: _Answer, rest: str) -> None:
    """Send a byte now and then: of the headers if `rest` says so, else of the body."""
    if rest != "headers":
        answer.send_response(200)
        answer.end_headers()
    else:
        answer.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    while True:
        answer.wfile.write(b"a")
        answer.wfile.flush()
        time.sleep(0.02)


def _short(answer: _Answer, rest: str) -> None:
    """Promise more than comes, until the third time."""
    body = PNG if answer.tries() > 2 else PNG[:50]
    answer.say(200, body, content_length=str(len(PNG)))


ANSWERS: dict[str, Callable[[_Answer, str], None]] = {
    "bad_length.png": lambda answer, rest: answer.say(200, PNG, content_length="999999999999"),
    "busy.png": lambda answer, rest: answer.say(200, PNG) if answer.tries() > 2 else answer.say(int(rest or 503)),
    "cut.png": lambda answer, rest: answer.say(200, PNG[:60]),
    "drip.png": _drip,
    "endless.png": _endless,
    "loop": lambda answer, rest: answer.say(302, location="/loop"),
    "ok.png": lambda answer, rest: answer.say(200, PNG),
    "packed.png": lambda answer, rest: answer.say(200, b"\x1f\x8b\x08", content_encoding="gzip"),
    "page.html": lambda answer, rest: answer.say(200, b"<html>Sign in</html>"),
    "short.png": _short,
    "to": lambda answer, rest: answer.say(302, location=rest),
    "wait.png": lambda answer, rest: (
        answer.say(200, PNG) if answer.tries() > 1 else answer.say(429, retry_after="9999")
    ),
}
