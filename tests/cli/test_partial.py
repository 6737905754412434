from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ktls.cli.failure import Failure
from ktls.cli.partial import PartialFile

URL = "https://files.example/a"


def begin(target: Path, data: bytes, validator: str | None = '"1"', size: int | None = 10) -> None:
    with PartialFile(target, URL) as part:
        part.start(0, validator, size)
        part.file.write(data)


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_target_appears_when_committed(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with PartialFile(target, URL) as part:
        part.start(0, '"1"', 3)
        part.file.write(b"new")
        assert target.read_bytes() == b"old"
        part.commit()
    assert target.read_bytes() == b"new"
    assert files(tmp_path) == {"a"}


def test_goes_on(tmp_path: Path) -> None:
    begin(tmp_path / "a", b"01234")
    with PartialFile(tmp_path / "a", URL) as part:
        assert (part.resume_at(), part.validator) == (5, '"1"')
        part.start(5, '"1"', 10)
        part.file.write(b"56789")
        part.commit()
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize(("size", "offset"), [(None, 5), (100, 5), (5, 4), (3, 2), (1, 0), (0, 0)])
def test_never_asks_for_an_empty_range(tmp_path: Path, size: int | None, offset: int) -> None:
    begin(tmp_path / "a", b"01234", size=size)
    with PartialFile(tmp_path / "a", URL) as part:
        assert part.resume_at() == offset


def test_start_drops_what_is_beyond(tmp_path: Path) -> None:
    begin(tmp_path / "a", b"01234")
    with PartialFile(tmp_path / "a", URL) as part:
        part.start(2, '"1"', 4)
        part.file.write(b"xy")
        part.commit()
    assert (tmp_path / "a").read_bytes() == b"01xy"


@pytest.mark.parametrize(
    "notes",
    [
        None,
        "",
        "not JSON",
        "[]",
        '"text"',
        json.dumps({"url": "https://other.example/", "validator": '"1"', "size": 9}),
        json.dumps({"url": URL, "validator": None, "size": 9}),
        json.dumps({"url": URL, "validator": '"1"\r\nX: y', "size": 9}),
    ],
)
def test_starts_anew_when_it_is_unknown_what_the_bytes_are(
    tmp_path: Path, notes: str | None
) -> None:
    begin(tmp_path / "a", b"01234")
    path = tmp_path / "a.part.json"
    if notes is None:
        path.unlink()
    else:
        path.write_text(notes, encoding="utf-8")
    with PartialFile(tmp_path / "a", URL) as part:
        assert part.resume_at() == 0
        assert part.validator is None


def test_nothing_is_left_of_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "a", b"")
    assert files(tmp_path) == set()


def test_without_validator_there_are_no_notes(tmp_path: Path) -> None:
    begin(tmp_path / "a", b"01234", validator=None)
    assert files(tmp_path) == {"a.part"}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "a", URL) as part:
        part.start(0, None, None)
        part.file.write(b"mine")
        with pytest.raises(Failure, match="another process is writing it"):
            PartialFile(tmp_path / "a", URL)
        assert part.length == 4


@pytest.mark.parametrize("target", ["/dev/null", ".", "pipe"])
def test_what_is_not_a_file_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(Failure, match="not a regular file"):
        PartialFile(Path(target), URL)
    assert files(tmp_path) == {"pipe"}


def test_part_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "a.part").symlink_to("victim")
    with pytest.raises(Failure, match="cannot write"):
        PartialFile(tmp_path / "a", URL)
    (tmp_path / "b.part.json").symlink_to("victim")
    begin(tmp_path / "b", b"01234")
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("target", ["missing/a", "file/a"])
def test_place_that_does_not_exist(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="cannot write"):
        PartialFile(tmp_path / target, URL)
