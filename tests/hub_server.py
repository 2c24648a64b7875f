"""A hub on this machine: the few addresses of the Hugging Face hub that pushing and reading a tokenizer need."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = r"(?P<name>[^/]+/[^/]+)"


class Hub:
    """Repositories in memory: files by name, by branch."""

    def __init__(self):
        self.branches = {}
        self.private = {}
        self.refused = {}  # by repository, the status and what the hub calls the reason
        self.asked = []
        self.url = ""

    def add(self, name, files, private=False):
        self.branches[name] = {"main": dict(files)}
        self.private[name] = private

    def commit_of(self, name, branch):
        return hashlib.sha1(f"{name} {branch}".encode()).hexdigest()

    def files_at(self, name, revision):
        for branch, files in self.branches.get(name, {}).items():
            if revision in (branch, self.commit_of(name, branch)):
                return branch, files
        return None, None


@contextmanager
def serving():
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.answer("GET")

        def do_HEAD(self):
            self.answer("HEAD")

        def do_POST(self):
            self.answer("POST")

        def answer(self, method):
            path = unquote(urlsplit(self.path).path)
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{method} {path}")
            for pattern, of_method, reply in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in of_method:
                    groups = found.groupdict()
                    if groups.get("name") in hub.refused:
                        status, code = hub.refused[groups["name"]]
                        return self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code}."})
                    if groups.get("name", "") and groups["name"] not in hub.branches:
                        return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                    return reply(self, content, **groups)
            return self.reply(404, b"{}")

        def reply(self, status, content, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def reply_json(self, value, status=200):
            self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def create(self, content):
            wanted = json.loads(content)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if name in hub.refused:
                return self.reply(hub.refused[name][0], b"{}", {"X-Error-Message": "not yours"})
            known = name in hub.branches
            if not known:
                hub.add(name, {}, private=wanted.get("private") or wanted.get("visibility") == "private")
            return self.reply_json({"url": f"{hub.url}/{name}"}, 409 if known else 200)

        def info(self, content, name, revision="main"):
            branch, _ = hub.files_at(name, revision)
            if branch is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.reply_json({"id": name, "sha": hub.commit_of(name, branch), "private": hub.private[name]})

        def tree(self, content, name, revision):
            _, files = hub.files_at(name, revision)
            return self.reply_json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
            )

        def resolve(self, content, name, revision, path):
            branch, files = hub.files_at(name, revision)
            etag = hashlib.sha1(files[path]).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit_of(name, branch)}
            return self.reply(200, files[path], headers)

        def branch(self, content, name, branch):
            hub.branches[name].setdefault(branch, {})
            return self.reply_json({})

        def preupload(self, content, name, revision):
            files = json.loads(content)["files"]
            return self.reply_json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for file in files
                    ]
                }
            )

        def commit(self, content, name, revision):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    hub.branches[name][revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = hub.commit_of(name, revision)
            return self.reply_json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})

        def fine(self, content):
            return self.reply_json({"errors": [], "warnings": []})

    ROUTES = [
        ("/api/repos/create", ("POST",), Handler.create),
        ("/api/validate-yaml", ("POST",), Handler.fine),
        (f"/api/models/{REPOSITORY}", ("GET",), Handler.info),
        (f"/api/models/{REPOSITORY}/revision/(?P<revision>.+)", ("GET",), Handler.info),
        (f"/api/models/{REPOSITORY}/tree/(?P<revision>.+)", ("GET",), Handler.tree),
        (f"/api/models/{REPOSITORY}/branch/(?P<branch>.+)", ("POST",), Handler.branch),
        (f"/api/models/{REPOSITORY}/preupload/(?P<revision>.+)", ("POST",), Handler.preupload),
        (f"/api/models/{REPOSITORY}/commit/(?P<revision>.+)", ("POST",), Handler.commit),
        (f"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", ("GET", "HEAD"), Handler.resolve),
    ]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
