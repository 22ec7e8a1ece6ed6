"""Fetching: from a server of this machine, and from made-up answers of name servers."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from web import PNG, Site, serving

from hfcustom.data import fetch as module
from hfcustom.data.fetch import fetch
from hfcustom.data.hosts import check_hosts
from hfcustom.data.images import ImageError

PUBLIC = "93.184.216.34"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing is waited for between attempts; the seconds are noted."""
    found: list[float] = []
    monkeypatch.setattr(module, "sleep", found.append)
    return found


def get(site: Site, path: str = "ok.png", *more: str) -> bytes:
    return fetch(site.url(path), check_hosts([site.host, *more]))


def fails(site: Site, path: str, *more: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        get(site, path, *more)
    return caught.value


def name_servers(monkeypatch: pytest.MonkeyPatch, site: Site, *addresses: str) -> list[str]:
    """Let every name be at these addresses, and connections to any go to the server; return where they were meant to go."""
    dialled: list[str] = []

    def connect(address: str, port: int, timeout: float) -> httpcore2.NetworkStream:
        dialled.append(address)
        stream = httpcore2.SyncBackend().connect_tcp("127.0.0.1", port, timeout)
        monkeypatch.setattr(stream, "get_extra_info", lambda info: (address, port) if info == "server_addr" else None)
        return stream

    monkeypatch.setattr(module, "resolve", lambda host, port: list(addresses))
    monkeypatch.setattr(module, "connect", connect)
    return dialled


def test_an_address_gives_its_bytes(site: Site) -> None:
    assert get(site) == PNG
    assert site.seen == [(f"127.0.0.1:{site.port}", "/ok.png")]


def test_nothing_is_asked_of_a_host_that_is_not_listed(site: Site) -> None:
    with pytest.raises(ImageError, match=r"none of the allowed hosts \(cdn.example.org\)"):
        fetch(site.url(), check_hosts(["cdn.example.org"]))
    assert not site.seen


# ---- names and their addresses --------------------------------------------------------------------------------------


def test_a_name_is_connected_to_by_its_checked_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = name_servers(monkeypatch, site, "10.0.0.1", PUBLIC)
    host = f"http://Cdn.Example.org:{site.port}"
    assert fetch(f"{host}/ok.png", check_hosts([host])) == PNG
    assert dialled == [PUBLIC]  # never the private one
    assert site.seen == [(f"cdn.example.org:{site.port}", "/ok.png")]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1%eth0"]
)
def test_a_name_with_no_public_address_is_refused(address: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = name_servers(monkeypatch, site, address)
    host = f"http://cdn.example.org:{site.port}"
    with pytest.raises(
        ImageError, match=f"cdn.example.org is at {address}, which is not public; .*by its address"
    ) as caught:
        fetch(f"{host}/ok.png", check_hosts([host]))
    assert (dialled, caught.value.code) == ([], "url")


def test_localhost_is_refused_though_listed(site: Site) -> None:
    host = f"http://localhost:{site.port}"
    with pytest.raises(ImageError, match="localhost is at .*, which is not public"):
        fetch(f"{host}/ok.png", check_hosts([host]))
    assert not site.seen


def test_a_name_is_looked_up_once_a_connection(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])  # another answer a moment later
    dialled = name_servers(monkeypatch, site)
    monkeypatch.setattr(module, "resolve", lambda host, port: next(answers))
    host = f"http://cdn.example.org:{site.port}"
    assert fetch(f"{host}/ok.png", check_hosts([host])) == PNG
    with pytest.raises(ImageError, match="cdn.example.org is at 127.0.0.1, which is not public"):
        fetch(f"{host}/ok.png", check_hosts([host]))
    assert dialled == [PUBLIC]


def test_where_the_connection_went_is_checked_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    name_servers(monkeypatch, site, PUBLIC)
    monkeypatch.setattr(module, "connect", lambda *_: httpcore2.SyncBackend().connect_tcp("127.0.0.1", site.port, 5))
    host = f"http://cdn.example.org:{site.port}"
    with pytest.raises(ImageError, match="the connection to cdn.example.org went to 127.0.0.1, which is not public"):
        fetch(f"{host}/ok.png", check_hosts([host]))
    assert not site.seen


def test_the_next_address_is_tried_where_one_is_dead(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = name_servers(monkeypatch, site, "8.8.8.8", PUBLIC)
    alive = module.connect

    def connect(address: str, port: int, timeout: float) -> httpcore2.NetworkStream:
        stream = alive(address, port, timeout)
        if address == "8.8.8.8":
            raise httpcore2.ConnectTimeout("timed out")
        return stream

    monkeypatch.setattr(module, "connect", connect)
    host = f"http://cdn.example.org:{site.port}"
    assert fetch(f"{host}/ok.png", check_hosts([host])) == PNG
    assert dialled == ["8.8.8.8", PUBLIC]


@pytest.mark.parametrize(("number", "attempts"), [(socket.EAI_AGAIN, 3), (socket.EAI_NONAME, 1)])
def test_a_name_that_nobody_knows(number: int, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        raise socket.gaierror(number, "no such name")

    monkeypatch.setattr(module, "resolve", resolve)
    with pytest.raises(ImageError, match=r"the name cdn.example.org cannot be looked up .*no such name"):
        fetch("https://cdn.example.org/a.png", check_hosts(["cdn.example.org"]))
    assert len(asked) == attempts


def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(site) == PNG


# ---- redirects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["/ok.png", "ok.png", "//127.0.0.1:{port}/ok.png", "{scheme}://127.0.0.1:{port}/ok.png"]
)
def test_a_redirect_to_an_allowed_host_is_followed(target: str, site: Site) -> None:
    assert get(site, "to?" + target.format(port=site.port, scheme=site.scheme)) == PNG


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("https://127.0.0.1/a.png", "is at '127.0.0.1', which is none of the allowed hosts"),
        ("http://[::1]/a.png", "which is none of the allowed hosts"),
        ("http://169.254.169.254/latest/meta-data/", "which is none of the allowed hosts"),
        ("https://evil.org/a.png", "is at 'evil.org', which is none"),
        ("//evil.org/a.png", "is at 'http://evil.org', which is none"),
        ("file:///etc/passwd", "'file' is not followed"),
        ("http://user@127.0.0.1/", "user name or a password"),
        ("http://a:99999999/", "no address|no port|cannot be fetched"),
    ],
)
def test_a_redirect_elsewhere_is_refused_and_both_addresses_named(target: str, reason: str, site: Site) -> None:
    error = fails(site, f"to?{target}")
    assert len(site.seen) == 1
    with pytest.raises(ImageError, match=reason):
        raise error
    assert "/to?" in str(error)


def test_a_redirect_to_a_name_at_a_private_address_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resolve", lambda host, port: ["127.0.0.1"])
    other = f"http://inside.example.org:{site.port}"
    assert "inside.example.org is at 127.0.0.1, which is not public" in str(fails(site, f"to?{other}/ok.png", other))
    assert site.paths() == [f"/to?{other}/ok.png"]


def test_redirects_in_a_circle_end(site: Site) -> None:
    assert "redirects more than 5 times" in str(fails(site, "loop"))
    assert len(site.seen) == 6


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_missing_picture_is_asked_for_once(site: Site, waits: list[float]) -> None:
    error = fails(site, "gone.png")
    assert "gone.png' cannot be fetched: the server answers with status 404. Drop the row" in str(error)
    assert (error.code, site.paths(), waits) == ("fetch", ["/gone.png"], [])


@pytest.mark.parametrize("path", ["busy.png", "busy.png?429", "busy.png?500", "short.png"])
def test_a_passing_failure_is_tried_again(path: str, site: Site, waits: list[float]) -> None:
    assert get(site, path) == PNG
    assert waits == [1.0, 2.0]


def test_a_lasting_failure_ends(site: Site, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    assert "could not be fetched in 2 attempts: the server answers with status 503. Try again later" in str(
        fails(site, "busy.png")
    )
    assert (len(site.seen), waits) == (2, [1.0])


def test_a_server_does_not_make_us_wait_for_hours(site: Site, waits: list[float]) -> None:
    assert get(site, "wait.png") == PNG
    assert waits == [30.0]


def test_a_server_that_is_not_there_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        host = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ImageError, match="could not be fetched in 3 attempts: .*refused"):
            fetch(f"{host}/a.png", check_hosts([host]))


def test_a_connection_that_is_gone_at_once_is_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(httpcore2.NetworkStream):
        def get_extra_info(self, info: str) -> Any:
            raise OSError("transport endpoint is not connected")

    monkeypatch.setattr(module, "connect", lambda *_: Gone())
    with pytest.raises(ImageError, match="in 3 attempts: transport endpoint is not connected"):
        fetch("https://127.0.0.1/a.png", check_hosts(["127.0.0.1"]))


@pytest.mark.parametrize("path", ["endless.png", "bad_length.png"])
def test_no_more_is_read_than_the_limit(path: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 200_000)
    error = fails(site, path)
    assert (error.code, len(site.seen)) == ("enormous", 1)
    assert "200000" in str(error)


@pytest.mark.parametrize("path", ["drip.png", "drip.png?headers"])
def test_a_slow_drip_is_cut_off(path: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOTAL_S", 0.3)
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    assert "it took more than 0.3 s" in str(fails(site, path))


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ImageError, match="could not be fetched in 3 attempts: .*timed out"):
            fetch(f"{host}/a.png", check_hosts([host]))


def test_packed_answers_are_not_unpacked(site: Site) -> None:
    assert "the server packs it ('gzip') though asked not to" in str(fails(site, "packed.png"))


# ---- https ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key with a certificate that it signed itself, for cdn.example.org and 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl, which makes certificates")
    file = tmp_path_factory.mktemp("certificate") / "both.pem"
    names = "subjectAltName=DNS:cdn.example.org,IP:127.0.0.1"
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=test -days 2 -addext {names}"
    subprocess.run([*command.split(), "-keyout", file, "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@pytest.fixture
def secure(certificate: Path) -> Iterator[Site]:
    with serving(certificate) as found:
        yield found


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trust that certificate, as a user names those of an own network."""
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    module._ssl_context.cache_clear()
    yield
    module._ssl_context.cache_clear()


def test_https_with_the_name_that_the_certificate_has(
    secure: Site, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(secure) == PNG
    dialled = name_servers(monkeypatch, secure, PUBLIC)
    assert fetch(secure.url(host="CDN.example.org."), check_hosts([f"cdn.example.org:{secure.port}"])) == PNG
    assert (dialled, secure.names) == ([PUBLIC], [None, "cdn.example.org"])


def test_a_certificate_of_another_name_is_refused(
    secure: Site, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_servers(monkeypatch, secure, PUBLIC)
    with pytest.raises(ImageError, match=r"its certificate is not trusted .*mismatch.*other.example.org"):
        fetch(secure.url(host="other.example.org"), check_hosts([f"other.example.org:{secure.port}"]))
    assert not secure.seen


def test_a_certificate_that_nobody_signed_is_refused_at_once(secure: Site, waits: list[Any]) -> None:
    module._ssl_context.cache_clear()
    assert "its certificate is not trusted (self" in str(fails(secure, "ok.png"))
    assert (secure.seen, waits) == ([], [])
