"""Values as JSON has them; and files read so that nothing blocks and no memory is filled."""

import json
import os
import socket
import sys

import pytest

from engine.files import json_line, open_regular, plain, read_bounded


def test_headline_floats_keep_six_digits_of_any_size():
    assert plain({"a": 123456.789, "b": 1.23456789e-7}, digits=6) == {"a": 123457.0, "b": 1.23457e-07}


def test_a_line_of_json_is_one_line_to_every_reader():
    """Line and paragraph separators of Unicode end a line for `str.splitlines`; a lone surrogate has no UTF-8."""
    value = {"text": "a\u2028b\u2029c\x85d\x0be\x1cf\ng \ud800 ä 囗"}
    line = json_line(value)
    assert json.loads(line) == value and line.decode().splitlines() == [line.decode()[:-1]]
    assert "ä 囗" in line.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes, sockets and devices among files")
def test_pipes_sockets_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as endpoint:
        previous = os.getcwd()
        os.chdir(tmp_path)  # a socket's path has at most 100 letters
        try:
            endpoint.bind("socket")
        finally:
            os.chdir(previous)
    said = {"pipe": "a named pipe", "link": "a named pipe", "socket": "a socket", "/dev/zero": "a device", "": "a folder"}
    for name, kind in said.items():
        with pytest.raises(OSError, match=f"{kind}, not a file"):
            open_regular(tmp_path / name)


def test_names_that_no_file_can_have_are_os_errors(tmp_path):
    for name in ("a\0b", "a\ud83d"):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)


def test_a_sparse_giant_is_refused_without_reading_it(tmp_path):
    with open(tmp_path / "giant", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1,099,511,627,776 bytes .expected at most 1,048,576"):
        read_bounded(tmp_path / "giant", 2**20)


def test_a_file_of_the_limit_is_read_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 64)
    assert read_bounded(tmp_path / "file", 64) == b"x" * 64
    with pytest.raises(OSError):
        read_bounded(tmp_path / "file", 63)
