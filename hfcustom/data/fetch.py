"""One address -> its bytes, over https from an allowed host, with limits on time, size and redirects.

Each request has a connection of its own, to an address that was checked to be public, under the name of the host: what
the name means a moment later is never asked. Proxies that the environment names are not used, since nothing is known of
the address that they would connect to.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable, Sequence
from functools import lru_cache
from time import monotonic, sleep
from typing import Any

import httpcore2
import httpx2

from hfcustom import __version__
from hfcustom.data.hosts import Host, check_url, is_address, is_public
from hfcustom.data.images import ImageError

ATTEMPTS = 3
WAIT_S = 1.0  # before the second attempt, twice that before the third
MAX_WAIT_S = 30.0  # whatever the server asks for
CONNECT_S = 10.0
READ_S = 20.0  # without a byte
TOTAL_S = 60.0  # of one attempt, redirects included
MAX_BYTES = 100_000_000
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
HEADERS: dict[bytes | str, bytes | str] = {
    "User-Agent": f"hfcustom/{__version__} (images of a data set)",
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # nothing to unpack, so nothing that unpacks into more than was counted
    "Connection": "close",
}


class _Transient(Exception):
    """A failure that may be over in a moment; `after` are the seconds that the server asks for."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


def fetch(url: str, hosts: Sequence[Host]) -> bytes:
    """Return what lies at an address; ImageError names the reason where it is not allowed or cannot be had."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _follow(url, hosts, monotonic() + TOTAL_S)
        except _Transient as error:
            if attempt == ATTEMPTS:
                raise ImageError(
                    f"Image {url!r:.200} could not be fetched in {ATTEMPTS} attempts: {error}. Try again later, or drop the row.",
                    "fetch",
                ) from error
            sleep(min(max(error.after, WAIT_S * 2 ** (attempt - 1)), MAX_WAIT_S))
    raise AssertionError("unreachable")


def _follow(url: str, hosts: Sequence[Host], deadline: float) -> bytes:
    """Return the bytes at an address or where it redirects to, each such place being checked like the first."""
    at, found_at = url, ""
    for _ in range(MAX_REDIRECTS + 1):
        parsed, host = check_url(at, hosts, found_at)
        answer = _ask(parsed, host, deadline)
        if isinstance(answer, bytes):
            return answer
        try:
            at = str(parsed.join(answer))
        except httpx2.InvalidURL as error:
            raise _failure(url, f"it redirects to {answer!r:.100}, which is no address") from error
        found_at = f", to which {url!r:.200} redirects,"
    raise _failure(url, f"it redirects more than {MAX_REDIRECTS} times")


def _ask(url: httpx2.URL, host: Host, deadline: float) -> bytes | str:
    """Return the answer to one request: bytes, or the address of a redirect."""
    timeout = {"connect": CONNECT_S, "read": READ_S, "write": READ_S, "pool": CONNECT_S}
    target = httpcore2.URL(scheme=host.scheme, host=host.name, port=host.port, target=url.raw_path)
    backend = _CheckedBackend(str(url), deadline)
    try:
        with (
            httpcore2.ConnectionPool(ssl_context=_ssl_context(), network_backend=backend) as pool,
            pool.stream(
                "GET", target, headers={"Host": host.netloc, **HEADERS}, extensions={"timeout": timeout}
            ) as response,
        ):
            return _read(str(url), response)
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
        late = monotonic() >= deadline
        reason = f"it took more than {TOTAL_S:g} s" if late else f"{error!s:.200}".rstrip(".") or type(error).__name__
        raise _Transient(reason) from error


def _read(url: str, response: httpcore2.Response) -> bytes | str:
    """Return the body of an answer, or where it redirects to, never more than MAX_BYTES of it."""
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
    status = response.status
    if status in REDIRECTS and headers.get("location"):
        return headers["location"]
    if status in TRANSIENT:
        asked = headers.get("retry-after", "")
        raise _Transient(f"the server answers with status {status}", float(asked) if asked.isdecimal() else 0.0)
    if status != 200:
        raise _failure(url, f"the server answers with status {status}")
    if (packed := headers.get("content-encoding", "identity").lower()) != "identity":
        raise _failure(url, f"the server packs it ({packed!r:.40}) though asked not to")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BYTES:
        raise _failure(url, f"it has {int(length)} bytes, of which at most {MAX_BYTES} are fetched", "enormous")
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise _failure(url, f"it has more than {MAX_BYTES} bytes", "enormous")
    return bytes(body)


def _failure(url: str, reason: str, code: str = "fetch") -> ImageError:
    return ImageError(f"Image {url!r:.200} cannot be fetched: {reason}. Drop the row, or download the image.", code)


# ---- connections ----------------------------------------------------------------------------------------------------


class _CheckedBackend(httpcore2.NetworkBackend):
    """Connects to public addresses only, or to the one that the list of hosts names itself; nothing outlasts `deadline`."""

    def __init__(self, url: str, deadline: float) -> None:
        self.url, self.deadline = url, deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address of a host that answers."""
        named = is_address(host)
        addresses = [host] if named else self._public_addresses(host, port)
        for at, address in enumerate(addresses):
            try:
                stream = connect(address, port, _left(self.deadline, timeout, httpcore2.ConnectTimeout))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if at == len(addresses) - 1:
                    raise
                continue
            peer = stream.get_extra_info("server_addr")[0]
            if named or is_public(peer):
                return _TimedStream(stream, self.url, self.deadline)
            stream.close()
            raise _failure(self.url, f"the connection to {host} went to {peer}, which is not public", "url")
        raise AssertionError("unreachable: a host has at least one address")

    def _public_addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = resolve(host, port)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise _Transient(f"the name {host} cannot be looked up now ({error.strerror})") from error
            raise _failure(self.url, f"the name {host} cannot be looked up ({error.strerror})") from error
        if public := [address for address in addresses if is_public(address)]:
            return public
        raise _failure(
            self.url,
            f"{host} is at {', '.join(addresses)}, which is not public; a host of a network of your own is allowed by its "
            "address in image_hosts",
            "url",
        )


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: str, port: int, timeout: float) -> httpcore2.NetworkStream:
    """Connect to an address, which is no name."""
    return httpcore2.SyncBackend().connect_tcp(address, port, timeout)


class _TimedStream(httpcore2.NetworkStream):
    """A connection of which no reading or writing outlasts `deadline`, however slowly its bytes drip."""

    def __init__(self, stream: httpcore2.NetworkStream, url: str, deadline: float) -> None:
        self.stream, self.url, self.deadline = stream, url, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return bytes that have come."""
        return self.stream.read(max_bytes, _left(self.deadline, timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        self.stream.write(buffer, _left(self.deadline, timeout, httpcore2.WriteTimeout))

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """Return the connection encrypted, its certificate being that of the name."""
        left = _left(self.deadline, timeout, httpcore2.ConnectTimeout)
        try:
            return _TimedStream(self.stream.start_tls(ssl_context, server_hostname, left), self.url, self.deadline)
        except httpcore2.ConnectError as error:
            if isinstance(cause := error.__cause__, ssl.SSLCertVerificationError):
                raise _failure(self.url, f"its certificate is not trusted ({cause.verify_message})") from error
            raise

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows of itself."""
        return self.stream.get_extra_info(info)


def _left(deadline: float, timeout: float | None, error: type[Exception]) -> float:
    left = deadline - monotonic()
    if left <= 0:
        raise error("no time is left")
    return left if timeout is None else min(left, timeout)


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    """Return the system's certificates, or those that SSL_CERT_FILE or SSL_CERT_DIR names."""
    return httpcore2.default_ssl_context()
