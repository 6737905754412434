from __future__ import annotations

import pytest

from ktls.cli.http_files import accepted_codings, parse_range, resolve

# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("bytes=0-0", range(1)),
        ("bytes=0-", range(10)),
        ("bytes=5-7", range(5, 8)),
        ("bytes=5-99", range(5, 10)),
        ("Bytes=9-", range(9, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=-99", range(10)),
        # to be ignored
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
        ("bytes=\u0661-", None),
        ("", None),
    ],
)
def test_ranges(header: str, wanted: range | None) -> None:
    assert parse_range(header, 10) == wanted


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_ranges_outside(header: str, size: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        parse_range(header, size)


# --- codings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", []),
        ("identity", []),
        ("deflate", []),
        ("gzip", ["gzip"]),
        ("GZIP, Br", ["br", "gzip"]),
        ("gzip, deflate, br, zstd", ["br", "zstd", "gzip"]),
        ("br;q=0.5, gzip", ["gzip", "br"]),
        ("br ; q=0.5 ,gzip;Q=0.8", ["gzip", "br"]),
        ("gzip;q=0", []),
        ("gzip;q=0.000", []),
        ("*", ["br", "zstd", "gzip"]),
        ("*, br;q=0", ["zstd", "gzip"]),
        ("*;q=0", []),
        ("gzip;q=0.5, identity", []),
        ("gzip;q=0.5, identity;q=0.1", ["gzip"]),
        ("gzip;q=nonsense", ["gzip"]),
        (",;,", []),
    ],
)
def test_codings(header: str, wanted: list[str]) -> None:
    assert accepted_codings(header) == wanted


# --- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "path", "directory"),
    [
        ("/", "", True),
        ("/a", "a", False),
        ("/a/", "a", True),
        ("//a//b", "a/b", False),
        ("/a?b/c", "a", False),
        ("/a#b/c", "a", False),
        ("/%61%3f", "a?", False),
        ("/a%2Fb", "a/b", False),
        ("/a/..", "", True),
        ("/a/.", "a", True),
        ("/../..", "", True),
        ("/a/../../b", "b", False),
        ("/%2e%2e/b", "b", False),
        ("/%C3%A9", "\u00e9", False),
        ("/%E9", "\udce9", False),
        ("/\udce9", "\udce9", False),
        ("HTTPS://host:1/a", "a", False),
        ("http://host", "", True),
    ],
)
def test_paths(target: str, path: str, directory: bool) -> None:
    assert resolve(target) == (path, directory)


@pytest.mark.parametrize("target", ["", "*", "a", "host:443", "ftp://host/a", "/a%00b"])
def test_no_paths(target: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        resolve(target)
