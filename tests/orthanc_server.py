"""A real PACS for tests: Orthanc with DICOMweb, on loopback, whose storage goes with the test."""

import json
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from email.parser import BytesParser
from pathlib import Path

import httpx2
import pytest

PLUGINS = ("/usr/share/orthanc/plugins/libOrthancDicomWeb.so", "/usr/local/share/orthanc/plugins/libOrthancDicomWeb.so")
STARTS = 120  # seconds that it may take to answer on a busy machine
PART = 'multipart/related; type="application/dicom"'


@contextmanager
def running_orthanc(tmp_path):
    """The address of its DICOMweb; skips where it is not installed."""
    program = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
    plugin = next((path for path in PLUGINS if Path(path).exists()), None)
    if program is None or plugin is None:
        pytest.skip("Orthanc with DICOMweb is not installed (Debian: orthanc orthanc-dicomweb)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "HttpPort": port,
        "HttpBindAddresses": ["127.0.0.1"],
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "StorageDirectory": str(tmp_path / "orthanc"),
        "IndexDirectory": str(tmp_path / "orthanc"),
        "Plugins": [plugin],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    with open(tmp_path / "orthanc.log", "wb") as log:
        process = subprocess.Popen([program, tmp_path / "orthanc.json"], stdout=log, stderr=log)
    try:
        for _ in range(STARTS * 5):
            try:
                httpx2.get(f"http://127.0.0.1:{port}/dicom-web/studies", timeout=60).raise_for_status()
                break
            except httpx2.HTTPError:
                assert process.poll() is None, (tmp_path / "orthanc.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait()


def store(address, paths):
    """STOW-RS."""
    parts = [b"--xxSTOWxx\r\nContent-Type: application/dicom\r\n\r\n" + path.read_bytes() + b"\r\n" for path in paths]
    body = b"".join(parts) + b"--xxSTOWxx--\r\n"
    headers = {"Content-Type": f"{PART}; boundary=xxSTOWxx", "Accept": "application/dicom+json"}
    answer = httpx2.post(f"{address}/studies", content=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    referenced, failed = (answer.json().get(tag, {}).get("Value", []) for tag in ("00081199", "00081198"))
    assert len(referenced) == len(paths) and not failed


def fetch(address, folder):
    """WADO-RS: every instance of a series."""
    answer = httpx2.get(address, headers={"Accept": PART}, timeout=60)
    answer.raise_for_status()
    whole = BytesParser().parsebytes(b"Content-Type: " + answer.headers["Content-Type"].encode() + b"\r\n\r\n" + answer.content)
    folder.mkdir()
    for number, part in enumerate(whole.get_payload()):
        (folder / f"{number}.dcm").write_bytes(part.get_payload(decode=True))
    return sorted(folder.iterdir())
