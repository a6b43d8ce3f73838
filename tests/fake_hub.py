"""A small Hugging Face Hub on the loopback address: repositories in memory, for what the client asks for."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


class FakeHub(ThreadingHTTPServer):
    """``repos`` are files by repository name; those in ``private`` answer only to `TOKEN`; ``asked`` are the paths."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.made: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        api = re.match(r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)(?P<rest>[^?]*)", self.path)
        file = re.match(r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^?]+)", self.path)
        found = api or file
        repo = "" if found is None else found["repo"]
        mine = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or repo not in self.server.repos or (repo in self.server.private and not mine):
            self.answer(401, b"", X_Error_Code="RepoNotFound")
            return
        files = self.server.repos[repo]
        if file is not None:
            data = files.get(file["name"])
            if data is None:
                self.answer(404, b"", X_Error_Code="EntryNotFound")
                return
            self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
            return
        assert api is not None
        if "/revision/" in api["rest"] and not api["rest"].endswith(("/main", COMMIT)):
            self.answer(404, b"", X_Error_Code="RevisionNotFound")
        elif "/tree/" in api["rest"]:
            self.answer(200, [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()])
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.answer(200, {"id": repo, "sha": COMMIT, "private": repo in self.server.private, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        if self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            name = f"{self.server.made[-1].get('organization', 'me')}/{self.server.made[-1]['name']}"
            self.server.repos.setdefault(name, {})
            self.answer(200, {"url": f"{self.server.address}/{name}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer(200, {"files": modes})
        elif (commit := re.match(r"/api/models/([\w.-]+/[\w.-]+)/commit/", self.path)) is not None:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in (line["value"] for line in lines if line["key"] == "file"):
                self.server.repos[commit[1]][line["path"]] = base64.b64decode(line["content"])
            self.answer(200, {"commitUrl": f"{self.server.address}/{commit[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer(404, {"error": self.path})


@contextmanager
def serve() -> Generator[FakeHub]:
    """Yield a hub that answers until the context ends."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def answer_for_the_hub(patch: pytest.MonkeyPatch, hub: FakeHub, folder: Path) -> None:
    """Send the client's requests to ``hub``: set what HF_ENDPOINT and HF_HOME set when the client is imported."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.delenv("HF_TOKEN", raising=False)
