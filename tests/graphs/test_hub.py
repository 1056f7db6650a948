"""Checkpoints by name: directories, and hub repositories served by a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch

from graphs.checkpoint import Checkpoint
from graphs.errors import UserError
from graphs.hub import resolve_checkpoint

REVISION = "a" * 40
FILES = {
    "config.json": b'{"model_type": "toy"}',
    "model.safetensors": safetensors.torch.save({"x": torch.arange(3.0)}),
    "tokenizer.model": b"pieces",
    "pytorch_model.bin": b"pickled",
    "modeling_toy.py": b"print('code')",
    "onnx/model.safetensors": b"another format of the same model",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download takes: one repository, org/name."""

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        path = self.path.partition("?")[0]
        headers = {"X-Error-Code": "RepoNotFound"}
        status, body = 404, b"{}"
        if path.startswith("/api/models/org/name/tree/"):
            oid = {name: hashlib.sha1(content).hexdigest() for name, content in FILES.items()}
            tree = [{"type": "file", "path": n, "size": len(c), "oid": oid[n]} for n, c in FILES.items()]
            status, body = 200, json.dumps(tree).encode()
        elif path == "/api/models/org/name/revision/nope":
            headers = {"X-Error-Code": "RevisionNotFound"}
        elif path.startswith("/api/models/org/name"):
            info = {"id": "org/name", "sha": REVISION, "siblings": [{"rfilename": name} for name in FILES]}
            status, body = 200, json.dumps(info).encode()
        elif path.startswith(f"/org/name/resolve/{REVISION}/"):
            status, body = 200, FILES[path.removeprefix(f"/org/name/resolve/{REVISION}/")]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": REVISION}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        return body


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(home: Path, endpoint: str, call: str, **environment: str) -> str:
    """What `resolve_checkpoint(<call>)` returns or refuses, in a process whose hub is `endpoint`."""
    script = (
        "from graphs.hub import resolve_checkpoint\n"
        "from graphs.errors import UserError\n"
        f"try: print(resolve_checkpoint({call}))\n"
        "except UserError as error: print('refused:', error)\n"
    )
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], env={**variables, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_a_hub_id_is_fetched_without_code_and_then_found_offline(tmp_path: Path, endpoint: str) -> None:
    found = Path(resolve(tmp_path, endpoint, "'org/name'"))
    assert {path.name for path in found.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert (found / "model.safetensors").is_symlink()
    with Checkpoint.open(found) as checkpoint:
        assert checkpoint.config == {"model_type": "toy"}
        assert checkpoint.tensor("x").tolist() == [0.0, 1.0, 2.0]
    assert resolve(tmp_path, endpoint, "'org/name'", HF_HUB_OFFLINE="1") == str(found)


def test_pickled_weights_are_fetched_behind_the_flag(tmp_path: Path, endpoint: str) -> None:
    found = Path(resolve(tmp_path, endpoint, "'org/name', allow_pickle=True"))
    assert (found / "pytorch_model.bin").read_bytes() == b"pickled"
    assert not (found / "modeling_toy.py").exists()


@pytest.mark.parametrize(
    ("call", "offline", "cause"),
    [
        ("'org/absent'", "0", "the hub has no such repository"),
        ("'org/name', revision='nope'", "0", "no such revision"),
        ("'org/absent'", "1", "not in the local cache"),
        ("'org/name--x'", "0", "refused: 'org/name--x'"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path: Path, endpoint: str, call: str, offline: str, cause: str) -> None:
    message = resolve(tmp_path, endpoint, call, HF_HUB_OFFLINE=offline)
    assert message.startswith("refused: 'org/")
    assert cause in message
    assert "\n" not in message


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    message = resolve(tmp_path, "http://127.0.0.1:1", "'org/name'")
    assert message == (
        "refused: 'org/name': no such directory, and from the hub: "
        "it is not in the local cache, and the hub cannot be reached"
    )


def test_directories(tmp_path: Path) -> None:
    (tmp_path / "mobilevlm-nano").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert resolve_checkpoint(tmp_path / "mobilevlm-nano") == tmp_path / "mobilevlm-nano"
    with pytest.raises(UserError, match=r"did you mean 'mobilevlm-nano'\?"):
        resolve_checkpoint(tmp_path / "mobilevlm-nona")
    with pytest.raises(UserError, match="a file; give the directory that holds it"):
        resolve_checkpoint(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="has no revision 'main'"):
        resolve_checkpoint(tmp_path / "mobilevlm-nano", revision="main")
    with pytest.raises(UserError, match="not a hub id of the form org/name"):
        resolve_checkpoint("../no/such/place")
