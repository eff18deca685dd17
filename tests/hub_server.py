"""A Hugging Face Hub on loopback: enough of its protocol for the real client libraries to load a data set from it."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

HANG_UP = 0

Response = tuple[int, dict[str, str], bytes]  # status, headers, body


class HubServer:
    """Serves data sets from memory.

    `repos` holds each one's files as {"owner/name": {"path": content}}. `failing` makes requests fail: it gives the
    status for every path that ends with a text, {"": 500} for all, {".jsonl": HANG_UP} to answer those with nothing.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.failing: dict[str, int] = {}
        self._port = 0  # any free one the first time, then the same again: the clients read their endpoint only once
        self._server = None

    @property
    def url(self) -> str:
        # `datasets` also asks a second host, "datasets-server." + this one. The user name takes that prefix here, so
        # this second host is loopback too and nothing is looked up by name.
        return f"http://hub@127.0.0.1:{self._port}"

    def start(self):
        if self._server is None:
            self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _Handler)
            self._server.hub = self
            self._port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def respond(self, url: str) -> Response:
        path = unquote(urlsplit(url).path)
        for end, status in self.failing.items():
            if path.endswith(end):
                return status, {}, b""
        root, _, rest = path.removeprefix("/").partition("datasets/")
        owner, name, route, revision, inner = (rest.split("/", 4) + [""] * 5)[:5]
        files = self.repos.get(f"{owner}/{name}")
        if root not in ("", "api/") or files is None:
            return _missing("RepoNotFound")
        commit = _digest(repr(sorted(files.items())).encode())
        if revision not in ("", "main", commit):
            return _missing("RevisionNotFound")
        if root == "" and route == "resolve" and inner in files:
            return 200, {"ETag": f'"{_digest(files[inner])}"', "X-Repo-Commit": commit}, files[inner]
        if root == "api/" and route in ("", "revision"):
            return _json({"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        if root == "api/" and route == "tree":
            recursive = parse_qs(urlsplit(url).query).get("recursive") == ["true"]
            if entries := _tree(files, inner, recursive):
                return _json(entries)
        return _missing("EntryNotFound", commit)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status, headers, body = self.server.hub.respond(self.path)
        if status == HANG_UP:
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """List the files and folders in a folder ("" for the top), and with `recursive` those further down too."""
    start = f"{folder}/" if folder else ""
    entries = {}
    for path, content in files.items():
        if path.startswith(start):
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
            while (path := path.rpartition("/")[0]) not in ("", folder):
                entries[path] = {"type": "directory", "path": path, "size": 0, "oid": _digest(path.encode())}
    return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(start)]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(value) -> Response:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _missing(what: str, commit: str | None = None) -> Response:
    return 404, {"X-Error-Code": what, **({"X-Repo-Commit": commit} if commit else {})}, b""
