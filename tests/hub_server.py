"""A Hugging Face Hub on loopback: enough of its protocol for the clients to load data
sets, and fetch or send models.

What `kaggle_server` needs too is here: a server that can be told to fail, and the ways
in which it does.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

# Faults: any HTTP status, or one of these.
HANG_UP = 0  # close the connection without an answer
HANG = "hang"  # answer nothing until released
HANG_HALF = "hang half"  # answer half of the body, and the rest only when released
CUT = "cut"  # announce the whole body, send half of it, close the connection
SHORT = "short"  # send half of the body as if that were all
RESET = "reset"  # reset the connection
Fault = int | str

_SENDS = (
    r"^PUT |^POST .*(/repos/create|/validate-yaml|/preupload/main|/objects/batch|/commit/main)$"
)
IN_THE_BODY = (HANG_HALF, CUT, SHORT)


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    fault: Fault | None = None


class LoopbackServer:
    """Answers each request with what `respond` says, which subclasses write.

    `failing` makes requests fail: it gives the fault for every path that ends with a
    text, {"": 500} for all, {".jsonl": HANG_UP} to answer those with nothing. A list of
    faults is used up, one a request.
    """

    def __init__(self):
        self.failing: dict[str, Fault | list[Fault]] = {}
        # any free one the first time, then the same again: clients read their endpoint
        # only once
        self._port = 0
        self._server = None
        self._released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self, port: int = 0):
        if self._server is None:
            self._server = _Server(("127.0.0.1", port or self._port), _Handler)
            self._server.owner = self
            self._port = self._server.server_port
            self._released.clear()
            self._server.loop = threading.Thread(
                target=self._server.serve_forever, args=(0.01,), daemon=True
            )
            self._server.loop.start()

    def stop(self):
        """Stop at once: every connection is closed, what hangs as well, and every
        thread has ended.
        """
        if self._server is not None:
            self._server.shutdown()
            self._server.close_connections(self._released)
            self._server.server_close()
            self._server.loop.join()
            self._server = None

    def release(self):
        """Answer, late, every request that hangs now."""
        self._released.set()
        self._released = threading.Event()

    def take_fault(self, path: str, besides: tuple[Fault, ...] = ()) -> Fault | None:
        """Take the fault that a path has now, unless it is one of `besides`."""
        for end, faults in self.failing.items():
            if path.endswith(end) and faults != []:
                fault = faults[0] if isinstance(faults, list) else faults
                if fault in besides:
                    return None
                return faults.pop(0) if isinstance(faults, list) else fault
        return None

    def respond(self, method: str, url: str, headers, body: bytes) -> Response:
        raise NotImplementedError


class HubServer(LoopbackServer):
    """Serves data sets and models.

    `repos` holds each data set's files as {"owner/name": {"path": content}}, `models`
    each model's, which may also be a folder. Models in `gated` are only for the tokens
    in `tokens_with_access`.

    Models are made and changed by the tokens in `users`, which gives each one's name:
    theirs are those of that owner. `private` holds the models that were made so,
    `commits` what each commit brought, `requests` all that was asked for and the
    Authorization header; README.md must not hold `bad_card`.
    """

    bad_card = b"license: [not closed"

    def __init__(self):
        super().__init__()
        self.repos: dict[str, dict[str, bytes]] = {}
        self.models: dict[str, dict[str, bytes] | Path] = {}
        self.gated: set[str] = set()
        self.tokens_with_access: set[str] = set()
        self.users: dict[str, str] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.requests: list[tuple[str, str | None]] = []
        self._large: dict[str, bytes] = {}  # by sha256

    @property
    def url(self) -> str:
        # `datasets` also asks a second host, "datasets-server." + this one. The user
        # name takes that prefix here, so this second host is loopback too and nothing
        # is looked up by name. It also takes the place of a token: where tokens matter,
        # the endpoint is `url_for_tokens`.
        return self.url_for_tokens.replace("://", "://hub@")

    @property
    def url_for_tokens(self) -> str:
        return super().url

    def respond(self, method: str, url: str, headers, body: bytes) -> Response:
        path = unquote(urlsplit(url).path)
        self.requests.append((f"{method} {path}", headers.get("Authorization")))
        fault = self.take_fault(path, besides=IN_THE_BODY if method == "HEAD" else ())
        if fault and isinstance(fault, int):
            return Response(fault, {}, b"")
        if re.search(_SENDS, f"{method} {path}"):
            return self._receive(path, headers.get("Authorization") or "", body)._replace(
                fault=fault
            )
        recursive = parse_qs(urlsplit(url).query).get("recursive") == ["true"]
        return self._answer(path, headers.get("Authorization") or "", recursive)._replace(
            fault=fault
        )

    def _answer(self, path: str, authorization: str, recursive: bool) -> Response:
        api, kind, path = re.fullmatch("/(api/)?(datasets/|models/)?(.*)", path).groups()
        owner, name, route, revision, inner = (path.split("/", 4) + [""] * 5)[:5]
        files = (self.repos if kind == "datasets/" else self.models).get(f"{owner}/{name}")
        if files is None:
            return _missing("RepoNotFound")
        if isinstance(files, Path):
            files = {
                str(file.relative_to(files)): file.read_bytes()
                for file in files.rglob("*")
                if file.is_file()
            }
        commit = _digest(
            repr(sorted((file, _digest(content)) for file, content in files.items())).encode()
        )
        if revision not in ("", "main", commit):
            return _missing("RevisionNotFound")
        if not api and route == "resolve" and kind is None and f"{owner}/{name}" in self.gated:
            scheme, _, token = authorization.partition(" ")
            if token not in self.tokens_with_access:
                return _gated(f"{owner}/{name}", known=scheme == "Bearer")
        if not api and route == "resolve" and inner in files:
            return Response(
                200, {"ETag": f'"{_digest(files[inner])}"', "X-Repo-Commit": commit}, files[inner]
            )
        if api and route in ("", "revision"):
            return _json(
                {
                    "id": f"{owner}/{name}",
                    "sha": commit,
                    "siblings": [{"rfilename": file} for file in files],
                }
            )
        if api and route == "tree" and (entries := _tree(files, inner, recursive)):
            return _json(entries)
        return _missing("EntryNotFound", commit)

    def _receive(self, path: str, authorization: str, body: bytes) -> Response:
        """What comes in, and who may send it: a signed address of the storage asks for
        no token.
        """
        if match := re.fullmatch("/storage/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return _json({"error": "BadDigest"}, 400)
            self._large[match[1]] = body
            return _json({})
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            message = (
                "Invalid credentials in Authorization header"
                if authorization
                else "Invalid username or password"
            )
            return _json({"error": message}, 401, {"X-Error-Message": message})
        if path == "/api/validate-yaml":
            wrong = self.bad_card in json.loads(body)["content"].encode()
            errors = (
                [{"message": "license: unexpected end of the flow collection"}] if wrong else []
            )
            return _json({"errors": errors, "warnings": []}, 400 if wrong else 200)
        asked = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            return self._create(asked[0], user)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return _json(
                {
                    "transfer": "basic",
                    "objects": [self._place(**one) for one in asked[0]["objects"]],
                }
            )
        match = re.fullmatch("/api/models/(([^/]+)/[^/]+)/(preupload|commit)/main", path)
        if not match or match[1] not in self.models:
            return _missing("RepoNotFound")
        if match[2] != user:
            return _forbidden()
        return getattr(self, f"_{match[3]}")(match[1], asked)

    def _create(self, asked: dict, user: str) -> Response:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != user:
            return _forbidden()
        if repo in self.models:
            url = f"{self.url_for_tokens}/{repo}"
            return _json({"error": "You already created this model repo", "url": url}, 409)
        self.models[repo] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo)
        return _json({"url": f"{self.url_for_tokens}/{repo}", "name": repo, "id": repo})

    def _preupload(self, repo: str, asked: list[dict]) -> Response:
        """Say how each file is to come, and which content is there already, as git or
        the storage names it.
        """
        files = []
        for one in asked[0]["files"]:
            large = one["path"].endswith((".safetensors", ".h5", ".spm", ".model"))
            old = self.models[repo].get(one["path"])
            names = (
                hashlib.sha256(old or b"").hexdigest(),
                _digest(b"blob %d\0" % len(old or b"") + (old or b"")),
            )
            oid = {} if old is None else {"oid": names[0] if large else names[1]}
            mode = "lfs" if large else "regular"
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return _json({"files": files})

    def _place(self, oid: str, size: int) -> dict:
        upload = {"href": f"{self.url_for_tokens}/storage/{oid}?signature=s3cret"}
        return {
            "oid": oid,
            "size": size,
            **({} if oid in self._large else {"actions": {"upload": upload}}),
        }

    def _commit(self, repo: str, asked: list[dict]) -> Response:
        brought = {}
        for line in asked[1:]:
            path = line["value"]["path"]
            small = line["key"] == "file"
            content = (
                base64.b64decode(line["value"]["content"])
                if small
                else self._large.get(line["value"]["oid"])
            )
            if content is None:
                return _json(
                    {"error": f"LFS pointer pointed to a file that does not exist: {path}"}, 400
                )
            brought[path] = content
        self.models[repo] |= brought
        self.commits.append((repo, brought))
        oid = _digest(repr(self.commits).encode())
        return _json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.url_for_tokens}/{repo}/commit/{oid}",
            }
        )


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, *args):
        super().__init__(*args)
        self.connections: dict[socket.socket, threading.Thread] = {}

    def process_request(self, request, client_address):
        arguments = (request, client_address)
        self.connections[request] = threading.Thread(
            target=self.process_request_thread, args=arguments, daemon=True
        )
        self.connections[request].start()

    def shutdown_request(self, request):
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER):
            self.close_request(request)  # nothing comes before the reset
        else:
            super().shutdown_request(request)

    def close_request(self, request):
        self.connections.pop(request, None)
        super().close_request(request)

    def close_connections(self, released: threading.Event):
        connections = dict(self.connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        released.set()
        for thread in connections.values():
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    def handle(self):
        # the client has gone, or the server was stopped
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self):
        owner = self.server.owner
        released = owner._released
        asked = self._body()
        status, headers, body, fault = owner.respond(self.command, self.path, self.headers, asked)
        if fault == HANG:
            released.wait()
        if fault == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in (HANG_UP, RESET):
            return
        half = len(body) // 2
        if fault == SHORT:
            body = body[:half]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in (CUT, HANG_HALF):
            self.wfile.write(body[:half])
            body = body[half:]
        if fault == HANG_HALF:
            released.wait()
        if fault != CUT:
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args):
        pass


@contextmanager
def hub_of_this_process(server: HubServer, cache: Path):
    """Make a server the Hub of this process, and a folder its cache."""
    from huggingface_hub import constants

    server.start()
    url = server.url_for_tokens
    template = url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    changed = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        # A storage of its own, with a protocol of its own.
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 2,
        "HF_HUB_DOWNLOAD_TIMEOUT": 2,
    }
    try:
        with patch.multiple(constants, **changed):
            yield server
    finally:
        server.stop()


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """List the files and folders in a folder ("" for the top), and with `recursive`
    those further down too.
    """
    start = f"{folder}/" if folder else ""
    entries = {}
    for path, content in files.items():
        if path.startswith(start):
            entries[path] = {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": _digest(content),
            }
            while (path := path.rpartition("/")[0]) not in ("", folder):
                entries[path] = {
                    "type": "directory",
                    "path": path,
                    "size": 0,
                    "oid": _digest(path.encode()),
                }
    return [
        entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(start)
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(value, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()
    )


def _forbidden() -> Response:
    """Say what the Hub says to one who may not write there."""
    message = "You don't have the rights to create a model under this namespace"
    return _json({"error": message}, 403, {"X-Error-Message": message})


def _missing(what: str, commit: str | None = None) -> Response:
    return Response(
        404, {"X-Error-Code": what, **({"X-Repo-Commit": commit} if commit else {})}, b""
    )


def _gated(repo: str, known: bool) -> Response:
    """Say what the Hub says to one who has no access, `known` by a token or not."""
    reason = (
        "you are not in the authorized list" if known else "you must be authenticated to access it"
    )
    message = f"Access to model {repo} is restricted and {reason}."
    return Response(
        403 if known else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": message}, b""
    )
