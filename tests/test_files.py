"""The door of the files that people bring with data=."""
import gzip
import lzma

import pytest

from config import UserError
from worlds.files import given, opened, read_bytes, read_json, read_lines, walked


def test_paths_are_comma_separated_and_a_comma_may_be_part_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,b,c"):
        (tmp_path / name).write_text("x")
    assert [str(path) for path in given("a, b,")] == ["a", "b"]
    assert [str(path) for path in given("a,b,c")] == ["a,b,c"]
    for data in ("a,nowhere", "nowhere"):
        with pytest.raises(UserError, match="^data: there is no file or folder nowhere$"):
            given(data)
    with pytest.raises(UserError, match="^data: there is no file or folder ,"):
        given(",")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_a_file_is_read_by_what_it_holds_and_not_by_its_name(tmp_path, pack):
    for name in ("x", "x.gz", "x.xz"):
        (tmp_path / name).write_bytes(pack(b"text"))
        assert read_bytes(tmp_path / name) == b"text"


@pytest.mark.parametrize("content, message", [
    (gzip.compress(b"text" * 999, mtime=0)[:-9], "cannot be unpacked: .*; is it whole"),
    (gzip.compress(b"text" * 999, mtime=0)[:9] + b"junk" * 9, "cannot be unpacked"),
    (lzma.compress(b"text" * 999)[:-9], "cannot be unpacked"),
    (lzma.compress(b"text" * 999)[:9] + b"junk" * 9, "cannot be unpacked")])
def test_a_damaged_archive_is_named(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=f"^data: {tmp_path}/x {message}") as error:
        read_bytes(tmp_path / "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line, message", [
    (b'{"a": 1', "line 2: not JSON: .*; is the file whole"),
    (b"[1, 2]", r"line 2: must be a JSON object, like {...}, not \[1, 2\]"),
    (b"null", "line 2: must be a JSON object"),
    (b'"' + b"x" * 999 + b'"', r"line 2: must be a JSON object, like {...}, not .{60}\.\.\.$"),
    (b"[" * 100_000, "line 2: not JSON"),
    (b"9" * 5000, "line 2: not JSON"),
    (b'{"a": "caf\xe9"}', "line 2: not text in UTF-8 .it holds the byte 0xe9."),
    (b'{"a": "\0"}', "line 2: not text in UTF-8 .it holds zero bytes."),
    ('{"a": 1}'.encode("utf-16"), "line 2: not text in UTF-8 .UTF-16.")])
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n' + line + b'\n\n{"a": 3}\n')
    with pytest.raises(UserError, match=f"^data: {path}, {message}") as error:
        list(read_lines(path))
    assert "\n" not in str(error.value)
    path.write_bytes(line)
    with pytest.raises(UserError, match=f"^data: {path}: "):
        read_json(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for name, what in (("nowhere", "is not there"), (".", "is a folder"), ("/dev/zero", "is no ordinary file")):
        with pytest.raises(UserError, match=f"^data: .* {what}; give a file"):
            with opened(tmp_path / name):
                pass


def test_folders_are_walked_once_by_links_too_and_hidden_ones_are_not(tmp_path):
    for name in ("in/b/x", "in/.git/x", "in/.x", "out/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "in/a").symlink_to("b")
    (tmp_path / "in/b/round").symlink_to("..")
    (tmp_path / "in/z").symlink_to("../out")
    found = [str((place / name).relative_to(tmp_path)) for place, names in walked(tmp_path / "in") for name in names]
    assert found == ["in/b/x", "in/z/x"]
