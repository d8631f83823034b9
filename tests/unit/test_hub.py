"""model.hub against a small local server that speaks the Hub's protocol; no network is touched."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from caravan.model import hub
from caravan.types import UserError

SHA = "a" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"t",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "README.md": b"words",
}
asked: list[str] = []


class Hub(http.server.BaseHTTPRequestHandler):
    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        asked.append(self.path)
        if "/org/gated" in self.path:
            return self._answer(403, X_Error_Code="GatedRepo")
        if "/revision/nope" in self.path:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        if self.path.startswith("/api/models/org/") and "/org/missing" not in self.path:
            names = [n for n in FILES if "picklish" not in self.path or not n.endswith(".safetensors")]
            siblings = [{"rfilename": name} for name in names]
            entries = [{"type": "file", "path": n, "size": len(FILES[n]), "oid": "0" * 40} for n in names]
            body = entries if "/tree/" in self.path else {"id": "org/good", "sha": SHA, "siblings": siblings}
            return self._answer(200, json.dumps(body).encode(), Content_Type="application/json")
        name = self.path.rsplit("/", 1)[-1].partition("?")[0]
        if "/resolve/" in self.path and name in FILES:
            etag = '"' + hashlib.sha1(FILES[name]).hexdigest() + '"'
            return self._answer(200, FILES[name], ETag=etag, X_Repo_Commit=SHA)
        return self._answer(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CODE = """
import sys
from caravan.model import hub
from caravan.types import UserError
for reference in sys.argv[1:]:
    try:
        light = reference.endswith("#light")
        print("ok", hub.fetch(reference.removesuffix("#light"), weights=not light))
    except UserError as error:
        print("error", error, "|", error.hint)
"""


def fetch(endpoint: str, home: Path, *references: str) -> list[str]:
    """In a process of its own: huggingface_hub reads its environment once, at import."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
    }
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *references],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout.splitlines()


def test_fetch_takes_weights_and_words_but_no_code(endpoint: str, tmp_path: Path) -> None:
    (light,) = fetch(endpoint, tmp_path / "light", "hf:org/good#light")
    names = {p.name for p in Path(light.removeprefix("ok ")).iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert not any(".safetensors" in path for path in asked if "/resolve/" in path)
    good, gated, missing, revision, pickle = fetch(
        endpoint,
        tmp_path,
        "hf:org/good",
        "hf:org/gated",
        "hf:org/missing",
        "hf:org/good@nope",
        "hf:org/picklish",
    )
    assert good.startswith("ok ")
    names = {p.name for p in Path(good.removeprefix("ok ")).iterdir()}
    words = {"config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert names == words | {"model.safetensors"}
    assert "org/gated is gated" in gated and "HF_TOKEN" in gated
    assert "no model 'org/missing'" in missing
    assert "no revision 'nope'" in revision
    assert "no .safetensors" in pickle
    assert not any("evil" in path or ".bin" in path for path in asked if "/resolve/" in path)
    # the second time everything is in the cache, and the network may be gone
    again, unknown = fetch("http://127.0.0.1:9", tmp_path, "hf:org/good", "hf:org/other")
    assert again == good
    assert "cannot reach http://127.0.0.1:9" in unknown and "local folder" in unknown


@pytest.mark.parametrize(
    "reference", ["gpt2", "hf:", "hf:a/b/c", "hf:../x", "hf:a/b@", "hf:a b", "hf:a/b@../../x"]
)
def test_malformed_ids_are_refused_before_any_network(reference: str) -> None:
    with pytest.raises(UserError, match="not a Hub id"):
        hub.fetch(reference)


def test_ids_are_taken_apart() -> None:
    assert hub.parse("hf:gpt2") == ("gpt2", None)
    assert hub.parse("hf:Qwen/Qwen2.5-0.5B@refs/pr/1") == ("Qwen/Qwen2.5-0.5B", "refs/pr/1")
