"""A hub on loopback that has one model, and a hub's cache filled by hand."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

NAME = "owner/model"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
LARGE = (".safetensors", ".bin", ".model")  # what is in Git LFS there, as large files are


def is_large(name):
    return name.endswith(LARGE)


def blob_name(name, content):
    """As the cache calls the content of a file: by its SHA-256 where it is in Git LFS, else as git does."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fill(cache, files, revision="main", name=NAME):
    """Puts a model into a hub's cache, as if it had been downloaded.

    Args:
      cache: the folder.
      files: content by name.
      revision: which of COMMITS it is.
      name: of the model.

    Returns:
      The snapshot's folder.
    """
    root = cache / f"models--{name.replace('/', '--')}"
    commit = COMMITS[revision]
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for file, content in files.items():
        blob = root / "blobs" / blob_name(file, content)
        blob.write_bytes(content)
        link = snapshot / file
        link.parent.mkdir(exist_ok=True)
        link.symlink_to("/".join([".."] * (2 + file.count("/"))) + f"/blobs/{blob.name}")
    return snapshot


@contextmanager
def cache_at(folder, offline):
    """The hub's library with its cache there; it has read the environment when it was imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield patch


class _Handler(BaseHTTPRequestHandler):
    """Answers what `snapshot_download` asks, about `server.files`: content by name."""

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        for revision, commit in COMMITS.items():
            for label in (revision, commit):
                default = revision == "main" and path == f"/api/models/{NAME}"
                if default or path == f"/api/models/{NAME}/revision/{label}":
                    names = [{"rfilename": name} for name in self.server.files]
                    return self.send_json({"id": NAME, "sha": commit, "siblings": names})
                if path == f"/api/models/{NAME}/tree/{label}":
                    return self.send_json([self.entry(*item) for item in self.server.files.items()])
                start = f"/{NAME}/resolve/{label}/"
                if path.startswith(start) and path.removeprefix(start) in self.server.files:
                    return self.send_file(path.removeprefix(start), commit, body)
        known = path.startswith(f"/api/models/{NAME}/")
        code = self.server.refusal or ("RevisionNotFound" if known else "RepoNotFound")
        return self.send(
            403 if code == "GatedRepo" else 404, b"", {"X-Error-Code": code, "X-Error-Message": code}, True
        )

    def entry(self, name, content):
        found = {"type": "file", "path": name, "size": len(content), "oid": blob_name(name, content)}
        if is_large(name):
            found["lfs"] = {"oid": blob_name(name, content), "size": len(content), "pointerSize": 100}
        return found

    def send_json(self, content):
        if self.server.refusal:
            return self.send(403, b"", {"X-Error-Code": self.server.refusal, "X-Error-Message": "no"}, True)
        return self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, True)

    def send_file(self, name, commit, body):
        if self.server.refusal_of_files:
            code = self.server.refusal_of_files
            return self.send(403, b"", {"X-Error-Code": code, "X-Error-Message": "no"}, body)
        content = self.server.files[name]
        etag = f'"{blob_name(name, content)}"'
        self.send(200, self.server.sent.get(name, content), {"X-Repo-Commit": commit, "ETag": etag}, body)

    def send(self, status, content, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def hub(files, cache):
    """A hub that has these files (content by name) as the model NAME, in all COMMITS.

    Yields:
      Its server: `asked` is what it was asked, `sent` what it gives in place of a file, `refusal` and
      `refusal_of_files` how it refuses all, or the files alone.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files, server.asked, server.sent = files, [], {}
    server.refusal = server.refusal_of_files = ""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        with cache_at(cache, offline=False) as patch:
            address = f"http://127.0.0.1:{server.server_port}"
            patch.setattr(constants, "ENDPOINT", address)
            template = address + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
