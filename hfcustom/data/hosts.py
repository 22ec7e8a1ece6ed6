"""Hosts from which pictures may be fetched: an explicit list, and what of an address has to be on it.

"cdn.example.org" allows https at that host, "*.example.org" at every host below it (not itself), "cdn.example.org:8443" at
another port, "http://cdn.example.org" without encryption. A host must have public addresses, unless it is written as an
address itself: "http://10.0.0.5:9000" allows that one and no other. Nothing heavy is imported, since options are checked
before anything is.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

PORTS = {"http": 80, "https": 443}
NAME = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)")  # as the last label: an address in one of its many spellings, no name
UNROUTED = ipaddress.ip_network("192.0.0.0/24")  # of which Python 3.11 takes some for global
NAT64 = ipaddress.ip_network("64:ff9b::/96")
SHOWN = 5  # hosts in a message


class Host(NamedTuple):
    """One entry of the list."""

    scheme: str
    name: str
    port: int
    below: bool = False  # the hosts below that name

    def __str__(self) -> str:
        return f"{'' if self.scheme == 'https' else f'{self.scheme}://'}{'*.' if self.below else ''}{self.netloc}"

    @property
    def netloc(self) -> str:
        """The host and its port, where that is not the usual one, as in an address."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port == PORTS[self.scheme] else f"{name}:{self.port}"

    def allows(self, other: Host) -> bool:
        """Whether this entry is about another, single host."""
        if (self.scheme, self.port) != (other.scheme, other.port):
            return False
        return other.name.endswith(f".{self.name}") if self.below else other.name == self.name


def check_hosts(entries: Sequence[str]) -> tuple[Host, ...]:
    """Return the entries of a list of hosts; ValueError for one that is no host, or too many at once."""
    if isinstance(entries, str):
        raise ValueError(f"image_hosts is the string {entries!r}; it must be a list of hosts: [{entries!r}].")
    return tuple(_entry(entry) for entry in entries)


def host_problems(image_hosts: Sequence[str], image_downloads: str | None) -> list[str]:
    """Return what is wrong with these two options, in words."""
    if image_downloads is not None and not image_hosts:
        return [f"image_downloads={image_downloads!r} has no effect without image_hosts"]
    found = []
    for entry in image_hosts:
        try:
            _entry(entry)
        except ValueError as error:
            found.append(str(error))
    return found


def _entry(entry: str) -> Host:
    wrong = f"image_hosts: {entry!r} is no host"
    scheme, separator, rest = entry.rpartition("://")
    below = rest.startswith("*.")
    try:
        url = _parse(f"{scheme if separator else 'https'}://{rest.removeprefix('*.')}")
        host = _host_of(url)
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}. {FORM}") from error
    if url.raw_path != b"/" or url.query or url.fragment or "@" in rest:
        raise ValueError(f"{wrong}: it names more than a host. {FORM}")
    address = _address(host.name)
    if below and (address is not None or "." not in host.name):
        raise ValueError(f"{wrong}: a star stands for the hosts below a name with a dot. {FORM}")
    if address is not None and (address.is_multicast or address.is_link_local or address.is_unspecified):
        raise ValueError(f"{wrong}: nothing is fetched from such an address. {FORM}")
    return host._replace(below=below)


def check_url(url: str, hosts: Sequence[Host], found_at: str = "") -> tuple[Any, Host]:
    """Return an address parsed, without fragment, and its host; ImageError where it is none, or not at an allowed host.

    `found_at` says in messages where the address comes from, if not from a row.
    """
    from hfcustom.data.images import ImageError

    shown = f"Image {url!r:.200}{found_at}"
    try:
        parsed = _parse(url)
        if parsed.userinfo:
            raise ValueError("it holds a user name or a password before '@'; leave them out")
        host = _host_of(parsed)
    except ValueError as error:
        raise ImageError(f"{shown} cannot be fetched: {error}.", "url") from error
    if not any(entry.allows(host) for entry in hosts):
        known = ", ".join(map(str, hosts[:SHOWN])) + (", ..." if len(hosts) > SHOWN else "")
        raise ImageError(
            f"{shown} is at {str(host)!r}, which is none of the allowed hosts ({known}); if you trust it, add it to "
            "image_hosts (--image-hosts), or download the image and give its path.",
            "url",
        )
    return parsed.copy_with(fragment=None), host


def _parse(url: str) -> Any:
    """Return an address as the library that fetches reads it, so that no two readers can disagree."""
    import httpx2

    try:
        return httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(str(error).rstrip(".")) from error


def _host_of(url: Any) -> Host:
    if url.scheme not in PORTS:
        raise ValueError(f"{url.scheme!r} is not followed, only https, and http where image_hosts says so")
    name = url.raw_host.decode("ascii").lower().removesuffix(".")
    address = _address(name)
    if address is None and (not NAME.fullmatch(name) or NUMBER.fullmatch(name.rpartition(".")[2])):
        raise ValueError(f"its host {name!r:.100} is neither a name nor an address")
    port = PORTS[url.scheme] if url.port is None else url.port
    if not 0 < port < 2**16:
        raise ValueError(f"there is no port {port}")
    return Host(url.scheme, name if address is None else str(address), port)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_address(name: str) -> bool:
    """Whether a host is written as an address."""
    return _address(name) is not None


def is_public(address: str) -> bool:
    """Whether an address is one of the open network: not of this machine, a private network, many machines, or no one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found in UNROUTED)


FORM = (
    "Write 'cdn.example.org', '*.example.org' for all hosts below it, 'cdn.example.org:8443' for another port, or "
    "'http://cdn.example.org' for one without encryption."
)
