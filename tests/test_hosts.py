"""Which hosts a list allows, and every trick by which an address could seem to be at one of them."""

from __future__ import annotations

import pytest

from hfcustom.data.hosts import check_hosts, check_url, host_problems, is_public
from hfcustom.data.images import ImageError

LISTED = check_hosts(
    ["cdn.example.org", "*.img.example", "http://plain.example:8080", "b\u00fccher.example", "10.0.0.5"]
)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://cdn.example.org/a.png", "cdn.example.org"),
        ("https://CDN.Example.ORG/a.png", "cdn.example.org"),
        ("HTTPS://cdn.example.org:443/a.png", "cdn.example.org"),
        ("https://cdn.example.org./a.png", "cdn.example.org"),
        ("https://cdn.example.org/a b\u00fc.png?x=@evil.org#part", "cdn.example.org"),
        ("https://cdn\u3002example.org/", "cdn.example.org"),  # a dot of other scripts is one to every resolver
        ("https://a.img.example/", "a.img.example"),
        ("https://a.b.img.example/", "a.b.img.example"),
        ("http://plain.example:8080/", "http://plain.example:8080"),
        ("https://b\u00fccher.example/", "xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        ("https://10.0.0.5/", "10.0.0.5"),
    ],
)
def test_an_address_at_a_listed_host_is_allowed(url: str, host: str) -> None:
    parsed, found = check_url(url, LISTED)
    assert str(found) == host
    assert not parsed.fragment


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://evil.org/a.png", "is at 'evil.org', which is none of the allowed hosts .*--image-hosts"),
        ("http://cdn.example.org/", "is at 'http://cdn.example.org', which is none"),
        ("https://plain.example:8080/", "is at 'plain.example:8080', which is none"),
        ("https://cdn.example.org:444/", "is at 'cdn.example.org:444', which is none"),
        ("https://cdn.example.org.evil.org/", "which is none"),
        ("https://evilcdn.example.org/", "which is none"),
        ("https://img.example/", "which is none"),  # a star is for hosts below
        ("https://aimg.example/", "which is none"),
        ("https://bucher.example/", "which is none"),
        ("https://cdn.example.org@evil.org/", "user name or a password"),
        ("https://evil.org\\@cdn.example.org/", "user name or a password"),
        ("https://user:word@cdn.example.org/", "user name or a password"),
        ("https://evil.org\\.cdn.example.org/", "neither a name nor an address"),
        ("https://evil.org%2f.img.example/", "neither a name nor an address"),
        ("https://cdn.example.org%2eevil.org/", "neither a name nor an address"),
        ("https://evil.org#@cdn.example.org/", "is at 'evil.org'"),
        ("https://evil.org?@cdn.example.org/", "is at 'evil.org'"),
        ("https://127.0.0.1/", "is at '127.0.0.1'"),
        ("https://[::1]/", r"is at '\[::1\]'"),
        ("https://[::ffff:10.0.0.5]/", "which is none"),
        ("https://[fe80::1%25eth0]/", "cannot be fetched|which is none"),
        ("https://2130706433/", "neither a name nor an address"),
        ("https://0x7f.0.0.1/", "neither a name nor an address|cannot be fetched"),
        ("https://0177.0.0.1/", "cannot be fetched"),
        ("https://127.1/", "neither a name nor an address"),
        ("https://\uff11\uff12\uff17.0.0.1/", "cannot be fetched"),
        ("https://localhost/", "is at 'localhost'"),
        ("https:///a.png", "neither a name nor an address"),
        ("https://cdn.example.org:0/", "there is no port 0"),
        ("https://cdn.example.org:99999/", "there is no port 99999"),
        ("https://cdn.example.org\r\n.evil.org/", "cannot be fetched"),
        ("https://cdn.example.org\t/", "cannot be fetched"),
        ("ftp://cdn.example.org/a.png", "'ftp' is not followed, only https"),
        ("file:///etc/passwd", "'file' is not followed"),
        ("gopher://cdn.example.org/", "'gopher' is not followed"),
        ("://cdn.example.org/", "cannot be fetched"),
    ],
)
def test_any_other_address_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        check_url(url, LISTED)
    assert caught.value.code == "url"


def test_a_long_list_is_not_written_out() -> None:
    with pytest.raises(ImageError, match=r"\(a0.example, .*a4.example, \.\.\.\)"):
        check_url("https://evil.org", check_hosts([f"a{at}.example" for at in range(50)]))


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ("CDN.example.org.", "cdn.example.org"),
        ("https://cdn.example.org:443", "cdn.example.org"),
        ("cdn.example.org:8443", "cdn.example.org:8443"),
        ("http://cdn.example.org:80", "http://cdn.example.org"),
        ("*.Example.org", "*.example.org"),
        ("[::1]:8443", "[::1]:8443"),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("localhost", "localhost"),
    ],
)
def test_an_entry_is_shown_as_it_may_be_written(entry: str, shown: str) -> None:
    (host,) = check_hosts([entry])
    assert str(host) == shown
    assert check_hosts([shown]) == (host,)


@pytest.mark.parametrize(
    "entry",
    [
        *("*", "*.org", "*.*.example.org", "a.*.org", "*.10.0.0.5", "cdn.example.org/pictures", "a.org?x", "a.org#x"),
        *("user@a.org", "@a.org", "ftp://a.org", "file:///", "a b", "", " ", ".", "a..org", "-a.org", "a.org:99999"),
        *(
            "2130706433",
            "0x7f.1",
            "127.1",
            "169.254.169.254",
            "224.0.0.1",
            "0.0.0.0",
            "[fe80::1]",
            "::1",
            "a.org,b.org",
        ),
    ],
)
def test_what_is_no_host_is_an_error_with_the_cure(entry: str) -> None:
    with pytest.raises(
        ValueError, match=r"image_hosts: .* is no host: .*Write 'cdn.example.org', '\*.example.org'"
    ) as caught:
        check_hosts(["good.example.org", entry])
    assert repr(entry) in str(caught.value)
    assert host_problems([entry, "good.example.org", entry], None) == [str(caught.value)] * 2


def test_one_string_is_no_list() -> None:
    with pytest.raises(
        ValueError, match=r"image_hosts is the string 'a.org'; it must be a list of hosts: \['a.org'\]"
    ):
        check_hosts("a.org")


def test_a_folder_without_hosts_has_no_effect() -> None:
    assert host_problems([], "pictures") == ["image_downloads='pictures' has no effect without image_hosts"]
    assert host_problems([], None) == host_problems(["a.org"], "pictures") == []


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.9.9.9",
            "10.1.1.1",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
        ),
        *("192.0.0.8", "198.18.0.1", "203.0.113.4", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1%eth0", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::127.0.0.1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)
