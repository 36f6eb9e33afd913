"""The download from the Hub, as processes against a real server that speaks the Hub's API."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub_server import serve

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_doNotShowThis"
FILES = {
    "config.json": b'{"model_type": "qwen2_vl"}',
    "VQA_CT/model.safetensors": bytes(range(256)) * 3000,
    "VQA_CT/a (1) & b.json": b"{}" * 300,
    "VQA_MRI/model.safetensors": b"m" * 70000,
    "VQA_MRI/empty.txt": b"",
}
LARGE = {"VQA_CT/model.safetensors", "VQA_MRI/model.safetensors"}
SIZE = sum(map(len, FILES.values()))
STORED = hashlib.sha256(FILES["VQA_CT/model.safetensors"]).hexdigest()


@pytest.fixture
def hub():
    with serve(dict(FILES), LARGE) as server:
        yield server


def start(folder: Path, endpoint: str, *flags: str, **environment: str) -> subprocess.Popen:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "recipes.download", *flags]
    env = inherited | settings | {"PYTHONPATH": str(ROOT), "VESALIUS_CACHE": str(folder / "cache")} | environment
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, endpoint: str, *flags: str, **environment: str) -> tuple[int, str, str]:
    process = start(folder, endpoint, *flags, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def download(folder: Path, endpoint: str, *flags: str, **environment: str) -> dict:
    code, out, err = run(folder, endpoint, "--model", "O/N", "--output", "out", *flags, **environment)
    assert code == 0, err
    return json.loads(out)


def refusal(folder: Path, endpoint: str, *flags: str, **environment: str) -> str:
    """The one line that a process ends with; it writes nothing to standard output, and no traceback."""
    code, out, err = run(folder, endpoint, *(flags or ("--model", "O/N", "--output", "out")), **environment)
    assert code == 2 and out == "" and "Traceback" not in err, err
    return err.splitlines()[-1]


def written(folder: Path) -> dict[str, bytes]:
    out = folder / "out"
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_model_arrives_whole_and_is_kept(hub, tmp_path):
    headline = download(tmp_path, hub.url)
    assert headline == {"path": "out", "files": 5, "size": SIZE, "fetched": 5, "kept": 0, "bytes": SIZE}
    assert written(tmp_path) == FILES, "and nothing else: no metadata, no parts"
    hub.log.clear()
    hub.storage.log.clear()
    assert download(tmp_path, hub.url) == headline | {"fetched": 0, "kept": 5, "bytes": 0}
    assert not any("/resolve/" in path for _, path, _ in hub.log) and not hub.storage.log


def test_a_data_set_and_a_part_of_a_repository(hub, tmp_path):
    code, out, err = run(tmp_path, hub.url, "--dataset", "O/N", "-o", "out", "--include", "VQA_MRI/", "--max-workers", "1")
    assert code == 0 and json.loads(out)["files"] == 2, err
    assert set(written(tmp_path)) == {"VQA_MRI/model.safetensors", "VQA_MRI/empty.txt"}
    assert any(path.startswith("/api/datasets/O/N") for _, path, _ in hub.log)
    assert any(path.startswith("/datasets/O/N/resolve/") for _, path, _ in hub.log)


def test_the_command_of_hugging_face_means_the_same(hub, tmp_path):
    flags = ["--repo-type", "dataset", "--local-dir", "out", "--local-dir-use-symlinks", "False", "--include", "*.json"]
    code, out, err = run(tmp_path, hub.url, "O/N", *flags)
    assert code == 0 and json.loads(out)["path"] == "out", err
    assert set(written(tmp_path)) == {"config.json", "VQA_CT/a (1) & b.json"}


def test_the_names_of_the_five_systems_are_listed(tmp_path):
    for flags in ((), ("--list",)):
        code, out, err = run(tmp_path, "http://127.0.0.1:9", *flags)
        names = json.loads(out)
        assert code == 0 and names["models"]["med-r1"]["repository"] == "yuxianglai117/Med-R1"
        systems = " ".join(row["systems"] for kind in names.values() for row in kind.values())
        assert all(system in systems for system in ("Med-R1", "MedVLM-R1", "Skin", "PRS-Med", "Uni-MedVLM"))
        assert all(name in err for kind in names.values() for name in kind)


def test_a_name_is_looked_up_in_any_case(hub, tmp_path):
    code, _, err = run(tmp_path, hub.url, "--model", "Med-R1", "--output", "out")
    assert code == 0, err
    assert any(path == "/api/models/yuxianglai117/Med-R1" for _, path, _ in hub.log)


def test_a_cut_connection_is_continued(hub, tmp_path):
    hub.storage.fail[STORED] = ["cut", "busy"]
    hub.fail["config.json"] = ["busy"]
    assert download(tmp_path, hub.url)["bytes"] == SIZE and written(tmp_path) == FILES
    assert hub.storage.ranges(STORED) == [None, "bytes=1000-", "bytes=1000-"]


def arrived(folder: Path) -> Path:
    """The part of the file on which the server stalls, once most of what it sent is there."""
    part, deadline = folder / "out/VQA_CT/.model.safetensors.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 150_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    return part


@pytest.mark.parametrize("flags, continued", [((), True), (("--no-resume",), False)])
def test_a_killed_process_is_continued_by_the_next(hub, tmp_path, flags, continued):
    hub.storage.fail[STORED] = ["stalled"]
    process = start(tmp_path, hub.url, "--model", "O/N", "--output", "out")
    part = arrived(tmp_path)
    process.kill()
    process.communicate()
    hub.storage.going_on.set()
    there = part.stat().st_size
    assert 150_000 < there <= 200_000 and not part.with_name("model.safetensors").exists()
    headline = download(tmp_path, hub.url, *flags)
    assert written(tmp_path) == FILES
    assert hub.storage.ranges(STORED) == [None, f"bytes={there}-" if continued else None]
    assert headline["bytes"] <= SIZE - (there if continued else 0)


def test_an_interrupt_ends_it_at_once_and_keeps_what_arrived(hub, tmp_path):
    hub.storage.fail[STORED] = ["stalled"]
    process = start(tmp_path, hub.url, "--model", "O/N", "--output", "out")
    part = arrived(tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == "" and err.splitlines()[-1] == "interrupted"
    assert part.stat().st_size > 150_000 and hub.storage.ranges(STORED) == [None]


def test_a_part_of_another_version_is_not_built_upon(hub, tmp_path):
    part = tmp_path / "out/VQA_CT/.model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"old" * 1000)
    (tmp_path / "out/config.json").write_bytes(b"x" * len(FILES["config.json"]))  # of the listed size
    download(tmp_path, hub.url)
    assert written(tmp_path) == FILES


def test_no_more_is_written_than_is_listed(hub, tmp_path):
    hub.storage.fail[STORED] = ["endless"] * 9
    line = refusal(tmp_path, hub.url)
    assert line.startswith("error: VQA_CT/model.safetensors: cannot be fetched from") and "(size or SHA256)" in line
    largest = max((path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()), default=0)
    assert largest <= len(FILES["VQA_CT/model.safetensors"])
    assert not list(tmp_path.rglob("*model.safetensors.part"))


def test_damaged_content_is_not_kept(hub, tmp_path):
    hub.fail["config.json"] = ["damaged"] * 9
    assert "config.json: cannot be fetched" in (line := refusal(tmp_path, hub.url)) and "(size or SHA1)" in line
    assert "config.json" not in written(tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil", "sub/.x.part"])
def test_paths_that_leave_the_folder_are_refused(hub, tmp_path, name):
    hub.files[name] = b""
    line = refusal(tmp_path, hub.url)
    assert line.startswith("error: O/N: lists ") and line.endswith("(expected paths that stay inside a folder)")
    assert not (tmp_path / "out").exists()


def test_the_disk_is_looked_at_before_anything_is_fetched(hub, tmp_path):
    hub.listed["VQA_CT/model.safetensors"] = 10**14
    assert "out: 100,000.0 GB are needed and " in refusal(tmp_path, hub.url)
    assert not (tmp_path / "out").exists() and not any("/resolve/" in path for _, path, _ in hub.log)


@pytest.mark.parametrize(
    "kind, token, line",
    [
        ("missing", "", "error: model O/N: not on {url} (HTTP 404), or it is private and takes --token or HF_TOKEN"),
        ("private", "", "error: model O/N: not on {url} (HTTP 401), or it is private and takes --token or HF_TOKEN"),
        ("private", TOKEN, "error: model O/N: not on {url} (HTTP 401), or this token may not see it"),
        (
            "gated",
            "",
            "error: model O/N: is gated: its terms are accepted at {url}/O/N, then it takes a token (--token or HF_TOKEN)",
        ),
        (
            "bad token",
            TOKEN,
            "error: model O/N: the token is not accepted by {url} (HTTP 401; expected a valid --token or HF_TOKEN)",
        ),
        ("forbidden", TOKEN, "error: model O/N: refused by {url}: HTTP 403 This token has no read access"),
        ("gated files", "", "cannot be fetched from {url}: HTTP 403"),
    ],
)
def test_each_refusal_of_the_hub_is_one_line(hub, tmp_path, kind, token, line):
    hub.refusal = kind
    flags = ["--model", "O/N", "--output", "out", *(["--token", token] if token else [])]
    assert line.format(url=hub.url) in refusal(tmp_path, hub.url, *flags)


@pytest.mark.parametrize(
    "endpoint, flags, environment, line",
    [
        ("http://127.0.0.1:9", ["--model", "O/N"], {}, "error: http://127.0.0.1:9: cannot be reached: [Errno"),
        ("http://nowhere.invalid", ["--model", "O/N"], {}, "error: http://nowhere.invalid: cannot be reached: "),
        ("http://127.0.0.1:9", ["--model", "O/N"], {"HF_HUB_OFFLINE": "1"}, "error: O/N: HF_HUB_OFFLINE is set"),
        ("file:///etc", ["--model", "O/N"], {}, "error: HF_ENDPOINT file:///etc: not the address of a Hub"),
        ("http://127.0.0.1:9", ["--model", "a..b/c"], {}, "error: a..b/c: no name of the Hub (expected OWNER/NAME)"),
        ("http://127.0.0.1:9", ["--model", "nothing"], {}, "error: --model nothing: expected OWNER/NAME on the Hub, or one of"),
        ("http://127.0.0.1:9", ["--model", "O/N", "--token", "a b"], {}, "error: --token (or HF_TOKEN): expected printable ASCII"),
        ("http://127.0.0.1:9", ["O/N", "--model", "O/N"], {}, "error: --model and --dataset: expected one of them, once"),
        ("http://127.0.0.1:9", ["O/N", "--local-dir-use-symlinks", "True"], {}, "error: --local_dir_use_symlinks is not supported"),
        ("http://127.0.0.1:9", ["--output", "out"], {}, "error: expected --model NAME or --dataset NAME"),
        ("http://127.0.0.1:9", [f"--tokn={TOKEN}"], {}, "error: unknown flag --tokn, did you mean --token?"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(tmp_path, endpoint, flags, environment, line):
    assert refusal(tmp_path, endpoint, *flags, **environment).startswith(line)


def test_the_token_goes_to_the_hub_alone_and_nowhere_else(hub, tmp_path):
    for folder, flags, environment in (("a", (), {"HF_TOKEN": TOKEN}), ("b", ("--token", TOKEN), {})):
        hub.log.clear()
        code, out, err = run(tmp_path, hub.url, "--model", "O/N", "--output", folder, *flags, **environment)
        assert code == 0, err
        sent = [{key.lower(): value for key, value in headers.items()}.get("authorization") for *_, headers in hub.log]
        assert len(sent) > 5 and set(sent) == {f"Bearer {TOKEN}"}
        assert TOKEN not in out + err
        assert all(path.startswith(("/api/models/O/N", "/O/N/resolve/")) for _, path, _ in hub.log), "and no telemetry"
    assert hub.storage.log and TOKEN not in str(hub.storage.log), "the storage is another server"
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in kept


def test_a_signed_address_is_not_shown(hub, tmp_path):
    hub.storage.fail[STORED] = ["busy"] * 9
    _, _, err = run(tmp_path, hub.url, "--model", "O/N", "--output", "out")
    assert "VQA_CT/model.safetensors: cannot be fetched" in err and "do-not-show" not in err
