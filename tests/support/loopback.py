"""A Hugging Face Hub and a Google Drive on the loopback interface, with injected faults.

The Hub keeps repositories in memory, with commits, tags, regular and large files (LFS). It
implements the part of the protocol that the Hub's client uses.
"""

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

HTML = b"<!DOCTYPE html><html><body>Please sign in to this network</body></html>"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".npz"))


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.tags.get(revision, revision)
        return self.commits[-1] if revision == "main" else dict_of(self.commits).get(revision)


def dict_of(commits: list[tuple[str, dict[str, bytes]]]) -> dict[str, Any]:
    return {oid: (oid, files) for oid, files in commits}


@dataclass
class Fault:
    """Act on the next `times` requests with a method and a text in their path."""

    method: str
    path: str
    act: Callable[["Request", bytes, dict[str, str]], None]
    times: int = 1


class Server(ThreadingHTTPServer):
    """Answer on 127.0.0.1 in a thread until `stop`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type["Request"]):
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.resumed = 0  # answers to range requests, from the middle of a file
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str, path: str) -> int:
        return sum(r.startswith(f"{method} ") and path in r for r in self.requests)

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self.thread.is_alive():
            self.shutdown()
            self.server_close()
            self.thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def handle_one_request(self) -> None:
        self.close_connection = True
        super().handle_one_request()

    def answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        """Send a response, unless a fault replaces it."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if status == 200 and "Accept-Ranges" in headers:
            requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if requested and int(requested[1]) < len(data):
                start, whole = int(requested[1]), len(data)
                self.server.resumed += start > 0
                data, status = data[start:], 206
                headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        fault = self.server.fault(self.command, self.path)
        if fault:
            return fault.act(self, data, headers)
        self.send(status, data, headers)

    def send(
        self, status: int, data: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        length = len(data) if length is None else length
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, document: Any, status: int = 200) -> None:
        self.answer(json.dumps(document).encode(), status, Content_Type="application/json")

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do(self) -> None:
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
        self.serve(urllib.parse.unquote(self.path))

    def serve(self, path: str) -> None:
        raise NotImplementedError

    do_HEAD = do_GET = do_POST = do_PUT = do

    def log_message(self, *arguments: Any) -> None:
        pass


class Hub(Server):
    """The part of the Hugging Face Hub that its client uses."""

    def __init__(self, token: str | None = None):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.token = token  # needed to write, and checked wherever one is sent
        super().__init__(HubRequest)

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Commit files without the client; return the hash."""
        return self.repositories.setdefault(name, Repository()).commit(files)


class HubRequest(Request):
    server: Hub

    def serve(self, path: str) -> None:
        path, _, _ = path.partition("?")
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        data = self.body() if self.command in ("POST", "PUT") else b""
        writes = self.command == "POST" and path not in ("/api/validate-yaml",)
        if path.startswith(("/large/", "/cdn/")):  # a signed address of a storage host
            return self.storage(path, data)
        if (sent or writes) and self.server.token and sent != self.server.token:
            return self.refuse(401, "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(data)["content"])
        for pattern, act in (
            (r"/api/models/([^/]+/[^/]+)/(preupload|commit|paths-info|tag)/([^/]+)", self.write),
            (r"/api/models/([^/]+/[^/]+)(/refs|/revision/[^/]+)?", self.info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch()()", self.write),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                repository = self.server.repositories.get(match[1])
                if repository is None:
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                return act(repository, data, *match.groups())
        self.refuse(404, f"nothing is at {path}")

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(json.dumps({"error": message}).encode(), status, **headers)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if fault := self.server.fault(self.command, self.path):  # nothing is created then
            return fault.act(self, b"{}", {})
        if name in self.server.repositories:
            return self.refuse(409, "You already created this model repo")
        repository = Repository(
            private=wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[name] = repository
        self.json({"url": f"{self.server.endpoint}/{name}"})

    def validate(self, card: str) -> None:
        """Check the front matter: a licence, and results that the client can parse."""
        try:
            front = yaml.safe_load(card.split("---\n")[1])
            if (
                not isinstance(front["license"], str)
                or front["license"] != front["license"].lower()
            ):
                raise ValueError("license")
            model_index_to_eval_results(front["model-index"])
        except Exception as error:
            return self.json({"errors": [{"message": repr(error)}], "warnings": []}, 400)
        self.json({"errors": [], "warnings": []})

    def write(
        self, repository: Repository, data: bytes, name: str, verb: str, revision: str
    ) -> None:
        oid, files = repository.at(revision or "main") or ("", {})
        if verb == "preupload":
            self.json(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if is_large(f["path"]) else "regular",
                            "shouldIgnore": False,
                            "oid": self.oid(f["path"], files),
                        }
                        for f in json.loads(data)["files"]
                    ]
                }
            )
        elif verb == "commit":
            self.commit(repository, name, [json.loads(line) for line in data.splitlines()])
        elif verb == "paths-info":
            names = urllib.parse.parse_qs(data.decode())["paths"]
            self.json([self.entry(n, files[n]) for n in names if n in files])
        elif verb == "tag":
            repository.tags[json.loads(data)["tag"]] = oid
            self.json({})
        else:
            self.batch(json.loads(data)["objects"])

    @staticmethod
    def oid(name: str, files: dict[str, bytes]) -> str | None:
        if name not in files:
            return None
        return sha256(files[name]) if is_large(name) else git_hash(files[name])

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
        if is_large(name):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return entry

    def batch(self, objects: list[dict[str, Any]]) -> None:
        for item in objects:
            if item["oid"] not in self.server.large:
                place = f"http://localhost:{self.server.server_port}/large/{item['oid']}"
                item["actions"] = {"upload": {"href": place}}
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        head, files = repository.commits[-1]
        if lines[0]["value"].get("parentCommit", head) != head:
            return self.refuse(412, "A commit has happened since")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.server.large:
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                return self.refuse(400, f"{line['key']} cannot be committed")
        oid = repository.commit(files)
        self.json({"commitOid": oid, "commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}"})

    def info(self, repository: Repository, data: bytes, name: str, rest: str | None) -> None:
        if rest == "/refs":
            tags = [
                {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid}
                for tag, oid in repository.tags.items()
            ]
            return self.json({"branches": [], "converts": [], "tags": tags})
        commit = repository.at((rest or "/revision/main").removeprefix("/revision/"))
        if commit is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": name} for name in commit[1]]
        private = repository.private
        self.json({"id": name, "sha": commit[0], "private": private, "siblings": siblings})

    def resolve(
        self, repository: Repository, data: bytes, name: str, revision: str, file: str
    ) -> None:
        commit = repository.at(revision)
        if commit is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        if file not in commit[1]:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content = commit[1][file]
        headers: dict[str, Any] = {"X-Repo-Commit": commit[0], "Accept-Ranges": "bytes"}
        if not is_large(file):
            return self.answer(content, ETag=f'"{git_hash(content)}"', **headers)
        self.server.large[sha256(content)] = content
        place = f"http://localhost:{self.server.server_port}/cdn/{sha256(content)}/{file}"
        linked = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        self.answer(b"", 302, Location=place, **linked, **headers)

    def storage(self, path: str, data: bytes) -> None:
        oid = path.split("/")[2]
        if self.command != "PUT":
            content = self.server.large[oid]
            return self.answer(content, ETag=f'"{oid}"', Accept_Ranges="bytes")
        fault = self.server.fault("PUT", path)
        if fault:
            return fault.act(self, b"", {})
        if sha256(data) != oid:
            return self.send(400, b"another hash", {})
        self.server.large[oid] = data
        self.send(200, b"", {})


# Faults


def status(code: int, **headers: str) -> Callable[..., None]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, data, _: request.send(code, b"", sent)


def cut(part: float) -> Callable[..., None]:
    """Close the connection after a part of the body."""

    def act(request: Request, data: bytes, headers: dict[str, str]) -> None:
        request.send(200, data[: int(part * len(data))], headers, length=len(data))

    return act


def replaced(change: Callable[[bytes], bytes], **headers: str) -> Callable[..., None]:
    """Send another body with a matching length."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, data, sent: request.send(200, change(data), {**sent, **more})


def head(without: str = "", **headers: str) -> Callable[..., None]:
    """Change the headers of the redirect to a large file."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}

    def act(request: Request, data: bytes, sent: dict[str, str]) -> None:
        kept = {name: value for name, value in sent.items() if name != without}
        request.send(302, data, {**kept, **more})

    return act


def html(request: Request, data: bytes, headers: dict[str, str]) -> None:
    """Send the login page of a captive portal instead."""
    request.send(200, HTML, {"Content-Type": "text/html"})


def trickle(pieces: int, seconds: float) -> Callable[..., None]:
    """Send the right body in pieces, with pauses."""

    def act(request: Request, data: bytes, headers: dict[str, str]) -> None:
        size = -(-len(data) // pieces)
        request.send(200, data[:size], headers, length=len(data))
        for start in range(size, len(data), size):
            request.wfile.flush()
            time.sleep(seconds / pieces)
            request.wfile.write(data[start : start + size])

    return act


def stall(part: float, until: threading.Event) -> Callable[..., None]:
    """Stall after a part of the body until an event, then close the connection."""

    def act(request: Request, data: bytes, headers: dict[str, str]) -> None:
        request.send(200, data[: int(part * len(data))], headers, length=len(data))
        request.wfile.flush()
        until.wait(60)

    return act


class Drive(Server):
    """Google Drive: files by their ids, its confirmation page and its quota page."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.quota = False
        self.asks = True
        super().__init__(DriveRequest)


class DriveRequest(Request):
    server: Drive

    def serve(self, path: str) -> None:
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(path).query))
        data = self.server.files.get(query.get("id", ""))
        if data is None:
            return self.answer(b"<html>404</html>", 404, Content_Type="text/html")
        if self.server.quota:
            page = (
                "<html><title>Google Drive - Quota exceeded</title>"
                '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file '
                "recently. Please try accessing the file again later.</p></html>"
            )
            return self.answer(page.encode(), Content_Type="text/html; charset=utf-8")
        if self.server.asks and query.get("confirm") != "t":
            page = (
                "<html><title>Google Drive - Virus scan warning</title>"
                '<form id="download-form" action="https://drive.usercontent.google.com/download" '
                'method="get"><input type="submit" value="Download anyway"/>'
                f'<input type="hidden" name="id" value="{query["id"]}">'
                '<input type="hidden" name="export" value="download">'
                '<input type="hidden" name="confirm" value="t"></form></html>'
            )
            return self.answer(page.encode(), Content_Type="text/html; charset=utf-8")
        self.answer(
            data,
            Content_Type="application/octet-stream",
            Content_Disposition='attachment; filename="knresnet18_imagenet.pth"',
        )
