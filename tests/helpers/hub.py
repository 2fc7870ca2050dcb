"""A small Hugging Face Hub: repositories with revisions, gated ones, and connections that drop."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/(.+)")
_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Files by commit, commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    etags: dict[tuple[str, str], str] = field(default_factory=dict)
    """By commit and file; made once, because weights are large."""
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit and move `ref` to it."""
        etags = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
        digest = hashlib.sha1(repr(sorted(etags.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.etags |= {(digest, file): etag for file, etag in etags.items()}
        self.refs[ref] = digest
        return digest

    def find(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


@dataclass
class Hub:
    """The hub at `url`, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    """File and `Range` of each GET of a file."""
    tokens: set[str | None] = field(default_factory=set)
    drop_once: set[str] = field(default_factory=set)
    """Files of which the first GET ends in the middle."""
    fail: set[str] = field(default_factory=set)
    """Files whose GET is answered 500."""

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def files(self) -> set[str]:
        return {file for file, _ in self.downloads}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on this machine, on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._respond(with_body=False)

        def do_GET(self) -> None:
            self._respond(with_body=True)

        def _respond(self, with_body: bool) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            path = unquote(urlsplit(self.path).path)
            if found := _TREE.fullmatch(path):
                self._tree(*found.groups())
            elif found := _INFO.fullmatch(path):
                self._info(found[1], found[2] or "main")
            elif found := _RESOLVE.fullmatch(path):
                self._file(*found.groups(), with_body)
            else:
                self._send(404, b"{}")

        def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
            repository = hub.repositories.get(name)
            if repository is None:
                # As huggingface.co answers without a token, to hide what is private.
                self._send(401, b'{"error": "Invalid username or password."}')
                return None
            commit = repository.find(revision)
            if commit is None:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return None
            return repository, commit

        def _info(self, name: str, revision: str) -> None:
            if found := self._find(name, revision):
                data = {"id": name, "sha": found[1], "gated": found[0].gated, "siblings": []}
                self._send(200, json.dumps(data).encode())

        def _tree(self, name: str, revision: str) -> None:
            if found := self._find(name, revision):
                repository, commit = found
                data = [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(content),
                        "oid": repository.etags[commit, path],
                    }
                    for path, content in repository.commits[commit].items()
                ]
                self._send(200, json.dumps(data).encode())

        def _file(self, name: str, revision: str, file: str, with_body: bool) -> None:
            found = self._find(name, revision)
            if found is None:
                return
            repository, commit = found
            if repository.gated and self.headers.get("Authorization") != "Bearer hf_good":
                self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
                return
            content = repository.commits[commit][file]
            headers = {"ETag": f'"{repository.etags[commit, file]}"', "X-Repo-Commit": commit}
            if not with_body:
                headers["Content-Length"] = str(len(content))
                self._send(200, b"", headers)
                return
            span = self.headers.get("Range")
            hub.downloads.append((file, span))
            if file in hub.fail:
                time.sleep(0.5)  # The other files are complete then.
                self._send(500, b"{}")
                return
            start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
            status = 206 if start else 200
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:]
            if file in hub.drop_once:
                hub.drop_once.discard(file)
                headers["Content-Length"] = str(len(body))
                body = body[: len(body) // 2]
                self.close_connection = True
            self._send(status, body, headers)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
