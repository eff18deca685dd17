"""Kaggle on loopback: enough of its API for the real clients, kagglehub and through it
KerasHub, to fetch and send.
"""

import base64
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from unittest.mock import patch
from urllib.parse import parse_qs, urlencode, urlsplit

from hub_server import IN_THE_BODY, LoopbackServer, Response


class KaggleServer(LoopbackServer):
    """Serves the files of folders, as versions 1 to 5 of each preset, to users who have
    consented.

    `presets` holds the folders by variation, the fourth part of a handle:
    {"gemma_2b_en": folder}. `users` holds names by secret: a token, or the key that
    goes with that user name. `consented` holds the names of users who accepted the
    licence. The path that `failing` goes by is that of the file asked for, as in
    "gemma_2b_en/3/config.json", or the method, as in "Hello"; faults in the body are
    only for files. `requests` holds what was asked, likewise, and with which
    Authorization header: first of the API and then, if it gave an address, "storage/" +
    the file. `checksums` and `ranges` say whether the storage sends an MD5 checksum and
    resumes.

    Users send to models of their own name. `private` says of each model that was made
    whether it is, `versions_of` holds the files of each version by handle, `licences`
    the licence that came with the first. The path of a file that is sent is "upload/" +
    its name, and a fault there that is no status keeps half of what came.
    """

    versions = range(1, 6)

    def __init__(self):
        super().__init__()
        self.presets: dict[str, Path] = {}
        self.users: dict[str, str] = {}
        self.consented: set[str] = set()
        self.requests: list[tuple[str, str | None]] = []
        self.checksums = True
        self.ranges = True
        self.private: dict[str, bool] = {}
        self.versions_of: dict[str, list[dict[str, bytes]]] = {}
        self.licences: dict[str, str | None] = {}
        self._blobs: list[dict] = []

    def respond(self, method: str, url: str, headers, body: bytes) -> Response:
        url = urlsplit(url)
        authorization = headers.get("Authorization")
        if match := re.fullmatch(r"/storage/([^/]+)/(\d+)/(.+)", url.path):
            self.requests.append((url.path[1:], authorization))
            fault = parse_qs(url.query).get("fault", [None])[0]
            return self._stored(self.presets[match[1]] / match[3], headers.get("Range"))._replace(
                fault=fault
            )
        if match := re.fullmatch(r"/upload/(\d+)", url.path):
            return self._receive(self._blobs[int(match[1])], headers, body)
        match = re.fullmatch(r"(?:/api)?/v1/[\w.]+/(\w+)", url.path)
        if method != "POST" or not match:
            return _error(404)
        called, asked = match[1], json.loads(body)
        what = called
        if called == "DownloadModelInstanceVersion":
            what = f"{asked['instanceSlug']}/{asked['versionNumber']}/{asked.get('path', '')}"
        self.requests.append((what, authorization))
        fault = self.take_fault(what, besides=() if "/" in what else IN_THE_BODY)
        if fault and isinstance(fault, int):
            return _error(fault)
        response = self._answer(called, asked, authorization)
        if fault in IN_THE_BODY and response.status == 302:
            location = f"{response.headers['Location']}?{urlencode({'fault': fault})}"
            return response._replace(headers={"Location": location})
        return response._replace(fault=fault)

    def _answer(self, called: str, asked: dict, authorization: str | None) -> Response:
        user = self._user(authorization)
        if authorization and not user:
            return _error(401, "Unauthenticated")
        if called == "Hello":
            return _json({"userName": user}) if user else _error(401, "Unauthenticated")
        if called in ("GetModel", "CreateModel", "StartBlobUpload") or called.startswith(
            "CreateModelInstance"
        ):
            return self._write(called, asked, user) if user else _error(401, "Unauthenticated")
        preset = asked.get("instanceSlug")
        if preset not in self.presets:
            return _error(404)
        if called == "GetModelInstance":
            return _json({"slug": preset, "versionNumber": self.versions[-1]})
        if user not in self.consented:
            return _error(403, "User has not consented to terms of use.")
        version, folder, path = (
            asked.get("versionNumber"),
            self.presets[preset],
            asked.get("path", ""),
        )
        if version not in self.versions:
            return _error(404)
        if called == "ListModelInstanceVersionFiles":
            files = [
                {"name": str(file.relative_to(folder))}
                for file in folder.rglob("*")
                if file.is_file()
            ]
            return _json({"files": files, "nextPageToken": ""})
        if called == "DownloadModelInstanceVersion" and (folder / path).is_file():
            return Response(302, {"Location": f"/storage/{preset}/{version}/{path}"}, b"")
        return _error(404)

    def _write(self, called: str, asked: dict, user: str) -> Response:
        if called == "StartBlobUpload":
            self._blobs.append(
                {"name": asked["name"], "size": asked["contentLength"], "content": b""}
            )
            token = str(len(self._blobs) - 1)
            return _json(
                {
                    "token": f"blob-{token}",
                    "createUrl": f"{self.url}/upload/{token}?signature=s3cret",
                }
            )
        model = f"{asked['ownerSlug']}/{asked.get('modelSlug') or asked.get('slug')}"
        if called == "GetModel" and model in self.private:
            return _json({"id": 1, "ref": model, "isPrivate": self.private[model]})
        if asked["ownerSlug"] != user:
            return _error(403, "Permission 'models.create' was denied")
        if called == "GetModel":
            return _error(404)
        if called == "CreateModel":
            self.private[model] = asked["isPrivate"]
            return _json({"id": 1, "ref": model, "url": f"{self.url}/models/{model}"})
        body, new = asked["body"], called == "CreateModelInstance"
        framework = (body if new else asked)["framework"].removeprefix("MODEL_FRAMEWORK_").lower()
        handle = f"{model}/{framework}/{(body if new else asked)['instanceSlug']}"
        if new and handle in self.versions_of:
            return _json({"error": "The instance slug is used already.", "errorCode": 409})
        blobs = [
            (folder, self._blobs[int(token.removeprefix("blob-"))])
            for folder, token in _tokens(body)
        ]
        if any(len(blob["content"]) != blob["size"] for _, blob in blobs):
            return _json({"error": "A file has not been uploaded completely.", "errorCode": 400})
        files = {folder + blob["name"]: blob["content"] for folder, blob in blobs}
        self.versions_of.setdefault(handle, []).append(files)
        if new:
            self.licences[handle] = body.get("licenseName")
        return _json({"id": 2, "ref": handle, "url": f"{self.url}/models/{handle}"})

    def _receive(self, blob: dict, headers, body: bytes) -> Response:
        """Take a file, or the rest of one, and say how much of it is here."""
        what = f"upload/{blob['name']}"
        self.requests.append((what, headers.get("Authorization")))
        asked = re.fullmatch(
            r"bytes (\*|(\d+)-\d+)/\d+", headers.get("Content-Range", "bytes 0-0/1")
        )
        fault = self.take_fault(what)
        if fault and isinstance(fault, int):
            return Response(fault, {}, b"")
        if asked[2]:
            blob["content"] = (
                blob["content"][: int(asked[2])]
                + body[: len(body) // 2 if fault is not None else None]
            )
        if fault is None and len(blob["content"]) == blob["size"]:
            return _json({})
        reached = {"Range": f"bytes=0-{len(blob['content']) - 1}"} if blob["content"] else {}
        return Response(308, reached, b"", fault)

    def _user(self, authorization: str | None) -> str | None:
        """Say whose credentials these are, if anyone's."""
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme != "Basic":
            return self.users.get(secret)
        name, _, key = base64.b64decode(secret).decode("latin-1").partition(":")
        return name if self.users.get(key) == name else None

    def _stored(self, file: Path, asked_range: str | None) -> Response:
        content = file.read_bytes()
        headers = {"Content-Type": "application/octet-stream"}
        if self.checksums:
            headers["X-Goog-Hash"] = (
                "md5=" + base64.b64encode(hashlib.md5(content).digest()).decode()
            )
        if not self.ranges:
            return Response(200, headers, content)
        headers["Accept-Ranges"] = "bytes"
        start = int(re.fullmatch(r"bytes=(\d+)-", asked_range or "bytes=0-")[1])
        if start >= len(content) > 0:
            return Response(416, headers, b"<Error><Code>InvalidRange</Code></Error>")
        if asked_range:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return Response(206 if asked_range else 200, headers, content[start:])


@contextmanager
def serving(server: KaggleServer, cache: Path):
    """Make a server the Kaggle of this process, and a folder its cache.

    The environment holds no credentials meanwhile. Those in files count: HOME says
    where.
    """
    from kagglehub import clients, config
    from kagglesdk import kaggle_env

    server.start()
    try:
        with (
            _environment(cache),
            patch.dict(kaggle_env._env_to_endpoint, {kaggle_env.KaggleEnv.PROD: server.url}),
            patch.object(config, "_kaggle_credentials", None),
            patch.object(
                config, "DEFAULT_KAGGLE_CREDENTIALS_FOLDER", str(Path.home() / ".kaggle")
            ),  # read at import
            # It looks for who called through the whole stack, which takes a second
            # under pytest.
            patch.object(clients, "get_user_agent", lambda: "kagglehub"),
        ):
            yield server
    finally:
        server.stop()


@contextmanager
def serving_subprocesses(server: KaggleServer, cache: Path):
    """Make a server the Kaggle of the processes that are started meanwhile, as
    `serving` does for this one.

    The client has one port for this, so a second test run waits here. It also prints
    all it sends and receives.
    """
    deadline = time.monotonic() + 300
    while True:
        try:
            server.start(7777)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    try:
        with _environment(cache, KAGGLE_API_ENVIRONMENT="TEST"):
            yield server
    finally:
        server.stop()


@contextmanager
def _environment(cache: Path, **variables: str):
    """Set what the client reads, and hide all else of that kind: credentials, other
    environments.
    """
    with patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith("KAGGLE") or name == "TBE_RUNTIME_ADDR":
                del os.environ[name]
        hosts = "127.0.0.1,localhost"
        os.environ.update(
            KAGGLEHUB_CACHE=str(cache), DISABLE_COLAB_CACHE="1", no_proxy=hosts, NO_PROXY=hosts
        )
        os.environ.update(variables)
        yield


def _tokens(body: dict, folder: str = "") -> Iterator[tuple[str, str]]:
    """Yield the token of each file that was sent, after its folder."""
    yield from ((folder, file["token"]) for file in body.get("files", ()))
    for inner in body.get("directories", ()):
        yield from _tokens(inner, f"{folder}{inner['name']}/")


def _json(value, status: int = 200) -> Response:
    return Response(
        status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode()
    )


def _error(status: int, message: str = "") -> Response:
    return _json({"code": status, "message": message or HTTPStatus(status).phrase}, status)
