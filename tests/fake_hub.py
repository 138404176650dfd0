"""A small Hugging Face Hub on 127.0.0.1, for the real `huggingface_hub` client to talk to.

Weights come and go as LFS files, everything else as regular git files; there is no Xet. The routes, headers and error
codes are those that the client reads in `hf_api.py`, `file_download.py`, `lfs.py`, `_commit_api.py` and
`utils/_http.py`. Data sets and spaces are not served.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api, hf_file_system, set_client_factory
from huggingface_hub.utils._http import default_client_factory


_ID, _REV = r"(?P<repo_id>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
_API = rf"/api/models/{_ID}"
_ROUTES = {
    r"POST /api/validate-yaml": "_validate_yaml",
    r"POST /api/repos/create": "_create_repo",
    rf"POST {_API}/branch/{_REV}": "_create_branch",
    rf"POST {_API}/preupload/{_REV}": "_preupload",
    rf"POST /{_ID}\.git/info/lfs/objects/batch": "_lfs_batch",
    r"PUT /lfs/(?P<oid>\w+)": "_lfs_put",
    rf"POST {_API}/commit/{_REV}": "_commit",
    rf"GET {_API}/tree/{_REV}": "_tree",
    rf"GET {_API}(?:/revision/{_REV})?": "_info",
    rf"(?:GET|HEAD) /{_ID}/resolve/{_REV}/(?P<path>.+)": "_resolve",
}
_WRITES = {"_create_repo", "_create_branch", "_preupload", "_lfs_batch", "_commit"}
_LFS_SUFFIXES = (".safetensors", ".bin")  # of those in the .gitattributes that the Hub writes


class HubError(Exception):
    """An error answer: status, message, `X-Error-Code`, further headers and further fields of the JSON body."""

    def __init__(self, status, message, code=None, headers=None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


def git_hash(data):
    """The name git gives to a file of these bytes: the Hub's `oid` and `ETag` of a regular file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data):
    """The name of an LFS file."""
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """A repository: `branches` (and pull requests' refs) name commits; a commit is `(title, {path: bytes})`."""

    private: bool = False
    gated: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)

    def sha(self, revision="main"):
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision="main"):
        return self.commits[self.sha(revision)][1]

    def commit(self, files, revision, title):
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = (title, files)
        self.branches[revision] = sha
        return sha

    def entries(self, revision):
        """What the tree route says of every file: `{path: entry}`."""
        entries = {}
        for path, data in sorted(self.files(revision).items()):
            entries[path] = {"type": "file", "oid": git_hash(data), "size": len(data), "path": path}
            if path.endswith(_LFS_SUFFIXES):
                entries[path]["lfs"] = {
                    "oid": sha256(data),
                    "sha256": sha256(data),
                    "size": len(data),
                    "pointerSize": 1,
                }
        return entries


class FakeHub:
    """The server, running while the context is open.

    `token` belongs to `user`, who may read and write everything; `stranger_token` is valid but sees public, ungated
    repositories only and writes nothing; any other token is refused everywhere, as the Hub does. `requests` records
    `(method, path)` of every request and `bodies` what came with it, `downloads` `(file, first byte)` of every file
    whose content was sent. `lfs` holds the uploaded LFS files by sha256.
    """

    user, token, stranger_token = "user", "owner-token", "stranger-token"

    def __init__(self):
        self.repos, self.requests, self.downloads, self.lfs, self.bodies = {}, [], [], {}, []
        self._cuts, self._lock, self._lfs_status = {}, threading.Lock(), 200

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()

    def add_files(self, repo_id, files, revision="main", private=False, gated=False):
        """Commits `{path: bytes}`; a missing branch or repository is made.

        `private` and `gated` count when the repository is made.
        """
        if repo_id not in self.repos:
            self.repos[repo_id] = Repo(private, gated)
            self.repos[repo_id].commit({".gitattributes": b""}, "main", "initial commit")
        repo = self.repos[repo_id]
        base = revision if revision in repo.branches else "main"
        return repo.commit({**repo.files(base), **files}, revision, "Upload")

    def upload_folder(self, repo_id, folder, revision="main", private=False, gated=False):
        """Commits the files of a local folder, without the client; returns the commit's sha."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        return self.add_files(repo_id, files, revision, private, gated)

    def refuse_uploads(self, status):
        """From now on the storage of LFS files answers this."""
        self._lfs_status = status

    def cut_after(self, path, n_bytes, times=1):
        """Drops the connection `n_bytes` into the body of the next `times` downloads of `path` (in any repository)."""
        self._cuts[path] = [n_bytes, times]

    def _answer(self, method, target, headers, body):
        url = urlsplit(target)
        self.requests.append((method, unquote(url.path)))
        self.bodies.append(body)
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", self.token, self.stranger_token):
            raise HubError(401, "Invalid credentials in Authorization header")
        request = {"method": method, "query": parse_qs(url.query), "headers": headers, "body": body}
        request["caller"] = {self.token: self.user, self.stranger_token: "stranger"}.get(token)
        for pattern, name in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{method} {url.path}"):
                args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "repo_id" in args:
                    repo = self.repos.get(args["repo_id"])
                    if repo is None or (repo.private and request["caller"] != self.user):
                        # Without a token the Hub does not tell a missing repository from a private one.
                        raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
                    args["repo"] = repo
                if name in _WRITES and request["caller"] is None:
                    raise HubError(401, "Invalid username or password.", "RepoNotFound" if "repo" in args else None)
                if name in _WRITES and request["caller"] != self.user:
                    raise HubError(403, "You don't have the rights to write to this repository")
                return getattr(self, name)(request, **args)
        raise HubError(404, f"No route for {method} {url.path}")

    def _validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    def _create_repo(self, request):
        payload = json.loads(request["body"])
        repo_id = f"{payload.get('organization') or self.user}/{payload['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", **answer)
        self.add_files(repo_id, {}, private=payload.get("visibility") == "private")
        return answer

    def _create_branch(self, request, repo_id, repo, revision):
        if revision in repo.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        repo.branches[revision] = repo.sha(json.loads(request["body"]).get("startingPoint", "main"))
        return {}

    def _preupload(self, request, repo_id, repo, revision):
        entries = repo.entries(revision)
        paths = [file["path"] for file in json.loads(request["body"])["files"]]
        answers = []
        for path in paths:
            entry = entries.get(path, {})
            # The oid of a file that is already there lets the client leave it out of the commit.
            oid, mode = entry.get("lfs", entry).get("oid"), "lfs" if path.endswith(_LFS_SUFFIXES) else "regular"
            answers.append({"path": path, "oid": oid, "uploadMode": mode, "shouldIgnore": False})
        return {"files": answers}

    def _lfs_batch(self, request, repo_id, repo):
        objects = json.loads(request["body"])["objects"]
        for entry in objects:
            if entry["oid"] not in self.lfs:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, request, oid):
        # No token: on the Hub the address itself is the permission.
        if self._lfs_status != 200:
            raise HubError(self._lfs_status, "The storage is out of order")
        if sha256(request["body"]) != oid:
            raise HubError(400, "The content does not match its sha256")
        self.lfs[oid] = request["body"]
        return {}

    def _commit(self, request, repo_id, repo, revision):
        operations = [json.loads(line) for line in request["body"].splitlines()]
        files, title = dict(repo.files(revision)), operations[0]["value"]["summary"]
        if operations[0]["value"].get("parentCommit", repo.sha(revision)) != repo.sha(revision):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for kind, value in ((operation["key"], operation["value"]) for operation in operations[1:]):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in self.lfs:
                files[value["path"]] = self.lfs[value["oid"]]
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise HubError(404, f"A file with this name doesn't exist: {kind} {value}", "EntryNotFound")
        answer = {"success": True}
        if request["query"].get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
            revision, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.url}/{repo_id}/discussions/{number}"
        sha = repo.commit(files, revision, title)
        return {**answer, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}

    def _tree(self, request, repo_id, repo, revision):
        return list(repo.entries(revision).values())

    def _info(self, request, repo_id, repo, revision="main"):
        siblings = [{"rfilename": path, "size": len(data)} for path, data in repo.files(revision).items()]
        return {"id": repo_id, "sha": repo.sha(revision), "siblings": siblings, "tags": [], "private": repo.private}

    def _resolve(self, request, repo_id, repo, revision, path):
        if repo.gated and request["caller"] != self.user:
            raise HubError(403 if request["caller"] else 401, f"Access to {repo_id} is restricted.", "GatedRepo")
        status, headers, data = 200, {"X-Repo-Commit": repo.sha(revision)}, repo.files(revision).get(path)
        if data is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{git_hash(data)}"', "Accept-Ranges": "bytes"}
        if path.endswith(_LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": len(data)}
        start, total, cut = 0, len(data), None
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request["headers"].get("Range", "")):
            status, start, stop = 206, int(wanted[1]), min(int(wanted[2] or total), total - 1)
            if start >= total:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{total}"})
            headers["Content-Range"], data = f"bytes {start}-{stop}/{total}", data[start : stop + 1]
        if request["method"] == "GET":
            self.downloads.append((path, start))
            if self._cuts.get(path, [0, 0])[1] > 0:
                self._cuts[path][1] -= 1
                cut = self._cuts[path][0]
        return status, headers, data, cut


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        # A client that goes away in the middle of an answer is no news; anything else is a bug in this file.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, cut = self.server.hub, None
        body = self._body()
        try:
            with hub._lock:
                answer = hub._answer(self.command, self.path, self.headers, body)
            if isinstance(answer, tuple):
                status, headers, data, cut = answer
            else:
                status, headers, data = 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        except HubError as error:
            status, headers, data = error.status, error.headers, json.dumps(error.body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        self.close_connection = self.close_connection or cut is not None

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_HEAD = do_POST = do_PUT = do_GET


def _constants(url, home):
    """The names under which the libraries keep the endpoint and the folders, all read once at import."""
    values = dict.fromkeys(("ENDPOINT", "HF_ENDPOINT", "HUGGINGFACE_CO_RESOLVE_ENDPOINT"), url)
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = url + "/{repo_id}/resolve/{revision}/{filename}"
    values |= dict.fromkeys(("HF_HOME", "HF_CACHE_HOME"), f"{home}")
    values |= dict.fromkeys(("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"), f"{home}/hub")
    values |= {"HF_MODULES_CACHE": f"{home}/modules", "HF_ASSETS_CACHE": f"{home}/assets"}
    values |= {"HF_TOKEN_PATH": f"{home}/token", "HF_STORED_TOKENS_PATH": f"{home}/stored_tokens"}
    values |= {"HF_DATASETS_CACHE": f"{home}/datasets", "HF_XET_CACHE": f"{home}/xet"}
    return {**values, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}


def _library_modules():
    names = ("huggingface_hub", "diffusers", "transformers", "accelerate", "peft", "datasets")
    return {name: module for name, module in list(sys.modules.items()) if module and name.partition(".")[0] in names}


def patch_constants(monkeypatch, **values):
    """Sets constants (say `HF_HUB_OFFLINE=True`) in `huggingface_hub` and in every module that has copied them."""
    for module in _library_modules().values():
        for name in values.keys() & vars(module).keys():
            is_path = isinstance(vars(module)[name], Path)
            monkeypatch.setattr(module, name, Path(values[name]) if is_path else values[name])


def hub_env(hub, tmp_path):
    """The environment of a process that knows this Hub and nothing of the machine's caches and tokens."""
    env = {key: value for key, value in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_", key)}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {**env, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def run_with_hub(hub, code, tmp_path, **env):
    """Runs Python code in a new process against the Hub, sharing the cache of the `fake_hub` fixture; its stdout."""
    env = {**hub_env(hub, tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _local_client():
    def check(request):
        assert request.url.host == "127.0.0.1", f"{request.method} {request.url} would leave this machine"

    client = default_client_factory()
    client.event_hooks["request"].append(check)
    return client


@contextmanager
def hub_in_process(monkeypatch, tmp_path):
    """A running `FakeHub` that the libraries in this process take for the Hub; caches in `tmp_path`, no token."""
    real = _constants(constants.ENDPOINT, constants.HF_HOME)
    real |= {name: vars(constants)[name] for name in real.keys() & vars(constants).keys()}
    loaded = _library_modules()
    with FakeHub() as hub:
        env = hub_env(hub, tmp_path)
        for key in os.environ.keys() - env.keys():
            monkeypatch.delenv(key)
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        patch_constants(monkeypatch, **_constants(hub.url, tmp_path / "hf"))
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(hf_file_system, "hffs", hf_file_system.HfFileSystem())
        # The folder of code loaded from the Hub is put on the path, and is a new one in each test.
        monkeypatch.setattr(sys, "path", list(sys.path))
        set_client_factory(_local_client)
        try:
            yield hub
        finally:
            set_client_factory(default_client_factory)
            for name in [n for n in sys.modules if n.startswith(("diffusers_modules", "transformers_modules"))]:
                del sys.modules[name]
            # What was imported in the meantime has copied the patched values, and must not keep them.
            for name in _library_modules().keys() - loaded.keys():
                for key in real.keys() & vars(sys.modules[name]).keys():
                    setattr(sys.modules[name], key, real[key])


@pytest.fixture(name="fake_hub")
def fake_hub(monkeypatch, tmp_path):
    # huggingface_hub 2.4's own, in its upload of LFS files; pytest restores the filters after each test
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    with hub_in_process(monkeypatch, tmp_path) as hub:
        yield hub
