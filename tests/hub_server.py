"""The part of the Hugging Face Hub's API that huggingface_hub uses, on the loopback; it can be made to cut and lie."""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN = "hf_canary0123456789"


class Hub(ThreadingHTTPServer):
    """What it holds and what it was asked for.

    repos: id -> {path: content} of the newest commit. commits: (id, hash) -> the same of those made through the API.
    refusals: id -> (status, error code). seen: (verb, path, authorization) of each request.
    send_file: (request, content, n) -> None, answers the n-th GET of a file; default `whole`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.commits, self.refusals, self.seen, self.large = {}, {}, {}, [], {}
        self.send_file: Callable[[Request, bytes, int], None] = whole
        self.files_sent, self.lock = 0, threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that went away

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    @property
    def downloads(self) -> list[str]:
        """The names of the files that were asked for, in order."""
        return [path.rpartition("/")[2] for verb, path, _ in self.seen if verb == "GET" and "/resolve/" in path]


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, value=None, status=200, content=None, **headers):
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, value in {"Content_Length": len(content), "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self):
        hub: Hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.seen.append((self.command, path, self.headers.get("Authorization")))
        words = path.removeprefix("/api/models").strip("/").split("/")
        repo = "/".join(words[:2]).removesuffix(".git")
        if self.command in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}" != words[0]:
            return self.send({"error": "Invalid credentials"}, 401) if words[0] != "large" else self.store(words, body)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            new = repo not in hub.repos
            hub.repos.setdefault(repo, {})
            return self.send({"url": f"{hub.url}/{repo}", "id": repo}, 200 if new else 409)
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if repo in hub.refusals or repo not in hub.repos:
            status, code = hub.refusals.get(repo, (401, "RepoNotFound"))
            return self.send({"error": "refused"}, status, X_Error_Code=code, X_Error_Message="refused")
        sha = hub.commit(repo)
        action, revision, *rest = [*words[2:], "", ""]
        if self.command == "POST":
            return self.send(getattr(self, {"info": "lfs"}.get(action, action))(repo, body))
        files = hub.repos[repo] if revision in ("", "main", sha) else hub.commits.get((repo, revision))
        if files is None:
            return self.send({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
        if action in ("", "revision"):
            listing = [{"rfilename": name} for name in files]
            facts = {"id": repo, "modelId": repo, "sha": sha, "private": False, "downloads": 0, "likes": 0, "tags": []}
            return self.send({**facts, "siblings": listing})
        if action == "tree":
            tree = [
                {"type": "file", "path": n, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for n, x in files.items()
            ]
            return self.send(tree)
        name = "/".join(rest).strip("/")
        if name not in files:
            return self.send({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")
        self.revision = sha if revision == "main" else revision
        if self.command == "HEAD":
            return whole(self, files[name])
        with hub.lock:
            n, hub.files_sent = hub.files_sent, hub.files_sent + 1
        return hub.send_file(self, files[name], n)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def store(self, words, body):
        self.server.large[words[1]] = body
        self.send({})

    def preupload(self, repo, body):
        return {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith("tensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
        }

    def lfs(self, repo, body):
        actions = [
            {**asked, "actions": {"upload": {"href": f"{self.server.url}/large/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": actions}

    def commit(self, repo, body):
        for line in map(json.loads, body.splitlines()):
            value, files = line["value"], self.server.repos[repo]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
        sha = self.server.commit(repo)
        self.server.commits[repo, sha] = dict(self.server.repos[repo])
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"}


def whole(request: Request, content: bytes, n: int = 0, cut: int | None = None, ranges: bool = True, **headers) -> None:
    """A good answer, which may ignore ranges, or end and close the connection after `cut` bytes."""
    start = int(re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-"))[1]) if ranges else 0
    etag = f'"{hashlib.sha1(content).hexdigest()}"'
    headers = {"Content_Length": len(content) - start, "ETag": etag, "X_Repo_Commit": request.revision, **headers}
    if start:
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    request.send(content=content[start:][:cut], status=206 if start else 200, **headers)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, and a client that would be set up so by HF_ENDPOINT and HF_HOME, which are read on import."""
    server = Hub()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
    }
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "huggingface_hub"]:
        for name, value in settings.items():
            if name in vars(module):
                monkeypatch.setattr(module, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between the client's attempts
    yield server
    server.close()
