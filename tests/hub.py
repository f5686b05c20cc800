"""A hub on this machine: the few endpoints that `huggingface_hub` needs to find and fetch the files of a repository.

with serve({"models/someone/teacher": folder, "datasets/someone/texts": folder}) as hub:
    subprocess.run(..., env={**os.environ, **hub.environment(cache)})
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories by `models/OWNER/NAME` or `datasets/OWNER/NAME`; `requests` lists what was asked for.

    With a folder for `uploads` models can be made and committed to; `created` says how they were asked for.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], uploads: Path | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.uploads = repositories, uploads
        self.created: dict[str, str] = {}
        self.requests: list[str] = []

    def environment(self, cache: Path) -> dict[str, str]:
        """What makes the libraries ask this hub, and keep what they fetch in `cache`."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

    def revision(self, repository: str) -> str:
        """Changes with the content, as a commit does."""
        return hashlib.sha1("".join(map(_etag, self.files(repository))).encode()).hexdigest()

    def files(self, repository: str) -> list[Path]:
        return sorted(path for path in self.repositories[repository].rglob("*") if path.is_file())


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve(repositories: dict[str, Path], uploads: Path | None = None) -> Iterator[Hub]:
    hub = Hub(repositories, uploads)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            kind, owner, name, *rest = parts[1:] + [""] * (4 - len(parts))
            self._api(f"{kind}/{owner}/{name}", rest)
        else:
            kind, parts = (parts[0], parts[1:]) if parts[0] == "datasets" else ("models", parts)
            self._file(f"{kind}/{parts[0]}/{parts[1]}", parts[4:] if len(parts) > 4 else [])

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(iter(self._chunk, b""))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")[1:]
        if self.server.uploads is None:
            return self._send(403, b"{}", {"X-Error-Message": "You have no right to write here."})
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.created[name] = "private" if asked.get("private") else asked.get("visibility", "public")
            made = self.server.repositories[f"models/{name}"] = self.server.uploads / name
            made.mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if parts == ["validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repository = "/".join(parts[:3])
        if parts[3] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                path = self.server.repositories[repository] / entry["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))
        commit = self.server.revision(repository)
        self._json(
            {"commitUrl": f"http://{self.headers['Host']}/{'/'.join(parts[1:3])}/commit/{commit}", "commitOid": commit}
        )

    def _chunk(self) -> bytes:
        """The next piece of a body that is sent in pieces."""
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _api(self, repository: str, rest: list[str]) -> None:
        if repository not in self.server.repositories:
            return self._missing("RepoNotFound")
        if rest[:1] == ["tree"]:
            found = self._below("/".join(rest[2:]), "recursive=true" in self.path.lower(), self._entries(repository))
            return self._json(found) if found else self._missing("EntryNotFound")
        siblings = [{"rfilename": entry["path"]} for entry in self._entries(repository)]
        kind, owner_and_name = repository.split("/", 1)
        self._json(
            {
                "id": owner_and_name,
                "sha": self.server.revision(repository),
                "siblings": siblings,
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2024-01-01T00:00:00.000Z",
                "createdAt": "2024-01-01T00:00:00.000Z",
            }
        )

    def _below(self, folder: str, recursive: bool, entries: list[dict]) -> list[dict]:
        """Files of a folder, and the folders in it."""
        prefix = f"{folder}/" if folder else ""
        inside = [entry for entry in entries if entry["path"].startswith(prefix)]
        deeper = [entry for entry in inside if "/" in entry["path"].removeprefix(prefix)]
        names = sorted({prefix + entry["path"].removeprefix(prefix).split("/")[0] for entry in deeper})
        folders = [{"type": "directory", "path": name, "size": 0, "oid": name} for name in names]
        return folders + (inside if recursive else [entry for entry in inside if entry not in deeper])

    def _entries(self, repository: str) -> list[dict]:
        root = self.server.repositories[repository]
        return [
            {
                "type": "file",
                "path": str(path.relative_to(root)),
                "size": path.stat().st_size,
                "oid": _etag(path),
            }
            for path in self.server.files(repository)
        ]

    def _file(self, repository: str, parts: list[str]) -> None:
        if repository not in self.server.repositories:
            return self._missing("RepoNotFound")
        path = self.server.repositories[repository].joinpath(*parts)
        if not path.is_file():
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": self.server.revision(repository)}
        self._send(200, path.read_bytes(), headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass
