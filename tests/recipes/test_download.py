"""The download of a bucket against a real server that lists and serves files as S3 does, also one that fails midway."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from engine.command.main import run_command
from engine.download import bucket
from engine.errors import InputError
from recipes.download import main

FILES = {
    "data/our-dataset/annotations/prostate.csv": b"image_path,image_name\n",
    "data/prs-med-dataset/breast/train_masks/benign (1) & more.png": bytes(range(256)) * 2000,
    "data/prs-med-dataset/skin/empty.txt": b"",
    "data/prs-med-dataset/skin/b.bin": b"b" * 70000,
}


class Bucket(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.etags, self.log, self.fail, self.ranges = dict(FILES), {}, [], {}, True
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args):
        """A connection that broke is part of the test."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        parts = urlsplit(self.path)
        self.server.log.append((unquote(parts.path)[1:], self.headers.get("Range")))
        if parts.path == "/":
            return self.send(200, self.listing(parse_qs(parts.query)))
        key = unquote(parts.path)[1:]
        content, start = self.server.files.get(key), 0
        if content is None:
            return self.send(404, b"")
        if self.headers.get("Range") and self.server.ranges:
            assert self.headers["If-Match"] == f'"{self.etag(key)}"'
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        failures = self.server.fail.get(key, [])
        failure = failures.pop(0) if failures else None
        if failure == "busy":
            return self.send(503, b"")
        if failure == "moved":
            return self.send(302, b"", location=f"{self.server.url}/{sorted(FILES)[0]}")
        body = content[start:] if failure != "damaged" else b"x" * len(content[start:])
        self.send(206 if start else 200, body, cut=1000 if failure == "cut" else None)

    def etag(self, key: str) -> str:
        return self.server.etags.get(key, hashlib.md5(FILES[key]).hexdigest())

    def listing(self, query: dict) -> bytes:
        """Two names a page."""
        names = [name for name in [*self.server.files, "data/folder/"] if name.startswith(query["prefix"][0])]
        first = int(query.get("continuation-token", ["0"])[0])
        entries = "".join(
            f"<Contents><Key>{name.replace('&', '&amp;')}</Key><ETag>&quot;{self.etag(name) if name in FILES else ''}&quot;</ETag>"
            f"<Size>{len(self.server.files.get(name, b''))}</Size></Contents>"
            for name in names[first : first + 2]
        )
        more = f"<NextContinuationToken>{first + 2}</NextContinuationToken>" if first + 2 < len(names) else ""
        return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{entries}{more}</ListBucketResult>'.encode()

    def send(self, status: int, body: bytes, cut: int | None = None, location: str | None = None) -> None:
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(bucket, "PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    server = Bucket()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(server, *flags: str) -> dict:
    return main(["--dataset", "prs-med", "--output", "out", "--url", server.url, *flags])


def written() -> dict[str, bytes]:
    return {"data/" + path.relative_to("out").as_posix(): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


def test_the_whole_bucket_arrives_and_stays(server):
    size = sum(map(len, FILES.values()))
    assert download(server) == {"path": "out", "files": 4, "size": size, "fetched": 4, "kept": 0, "bytes": size}
    assert written() == FILES
    server.log.clear()
    assert download(server) == {"path": "out", "files": 4, "size": size, "fetched": 0, "kept": 4, "bytes": 0}
    assert all(name == "" for name, _ in server.log)


def test_a_part_of_the_bucket_can_be_asked_for(server):
    assert download(server, "--include", "our-dataset/")["files"] == 1
    assert list(written()) == ["data/our-dataset/annotations/prostate.csv"]
    with pytest.raises(InputError, match="no file begins with 'data/nothing'"):
        download(server, "--include", "nothing")


def test_a_cut_file_goes_on_where_it_stopped(server):
    server.fail["data/prs-med-dataset/skin/b.bin"] = ["cut", "busy"]
    headline = download(server)
    assert written() == FILES and headline["bytes"] == sum(map(len, FILES.values()))
    ranges = [span for name, span in server.log if name.endswith("b.bin")]
    assert ranges == [None, "bytes=1000-", "bytes=1000-"]


def test_what_a_stopped_run_left_is_continued(server):
    part = Path("out/prs-med-dataset/skin/.b.bin.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"b" * 69000)
    assert download(server)["bytes"] == sum(map(len, FILES.values())) - 69000
    assert written() == FILES
    Path("out/prs-med-dataset/skin/b.bin").unlink()
    part.write_bytes(b"b" * 80000)  # more than there is
    server.ranges = False
    assert download(server)["bytes"] == 70000 and written() == FILES


def test_a_server_without_ranges_sends_it_all_again(server):
    server.ranges = False
    server.fail["data/prs-med-dataset/skin/b.bin"] = ["cut"]
    download(server)
    assert written() == FILES


def test_damaged_content_is_not_kept(server):
    server.fail["data/prs-med-dataset/skin/b.bin"] = ["damaged"]
    download(server)
    assert written() == FILES
    Path("out/prs-med-dataset/skin/b.bin").unlink()
    server.fail["data/prs-med-dataset/skin/b.bin"] = ["damaged"] * 9
    with pytest.raises(InputError, match=r"skin/b.bin: cannot be fetched from .* \(size or MD5\)"):
        download(server)
    assert not list(Path("out/prs-med-dataset/skin").glob("*b.bin*"))


def test_a_redirect_is_not_followed(server):
    server.fail["data/prs-med-dataset/skin/b.bin"] = ["moved"]
    with pytest.raises(InputError, match=rf"skin/b.bin: cannot be fetched from .*: HTTP 302 to {server.url}/data/our-dataset"):
        download(server)
    assert not Path("out/prs-med-dataset/skin/b.bin").exists()


def test_an_etag_of_parts_is_no_md5(server):
    server.etags["data/prs-med-dataset/skin/b.bin"] = "0" * 32 + "-2"
    assert download(server)["fetched"] == 4


def test_names_that_leave_the_folder_are_refused(server):
    for name in ("data/../../evil", "data//etc/passwd", "data/a\\..\\b", "data/C:x"):
        server.files = {name: b""}
        with pytest.raises(InputError, match="expected names that stay inside a folder"):
            download(server)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "flags, line, reason",
    [
        (["--url", "http://127.0.0.1:9"], "error: http://127.0.0.1:9: cannot be reached: [", "refused"),
        (["--url", "file:///etc"], "error: file:///etc: not the address of a bucket", "(expected https://HOST)"),
        (["--dataset", "other"], "error: --url: is for prs-med", "HF_ENDPOINT"),
        (["--dataset", "abaryan/ham10000_bbox"], "error: --url: is for prs-med", "HF_ENDPOINT"),
        (["--model", "med-r1"], "error: --model and --dataset: expected one of them, once", ""),
    ],
)
def test_what_cannot_be_fetched_is_one_line(server, capsys, flags, line, reason):
    with pytest.raises(SystemExit) as end:
        run_command(main, ["--output", "out", "--dataset", "prs-med", "--url", server.url, *flags])
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert end.value.code == 2 and out == "" and last.startswith(line) and reason in last and "Traceback" not in err


def test_other_answers_than_a_listing_are_one_line(server):
    with pytest.raises(InputError, match="cannot be reached: HTTP 404"):
        download(server, "--url", server.url + "/nothing/here")
    Handler.listing, original = lambda *_: b"<html>", Handler.listing
    try:
        with pytest.raises(InputError, match="does not answer as a bucket does"):
            download(server)
    finally:
        Handler.listing = original


def test_a_file_that_was_changed_here_is_fetched_again(server):
    download(server)
    Path("out/prs-med-dataset/skin/b.bin").write_bytes(b"c" * 70000)
    assert download(server)["fetched"] == 1 and written() == FILES
