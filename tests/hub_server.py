"""A hub on this machine: the few addresses of the Hugging Face hub that pushing and reading need.

Repositories of models are called `organisation/name`, those of data sets `datasets/organisation/name`. Parquet files
are uploaded one by one, as large files are, and all others within the commit.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = r"(?P<name>[^/]+/[^/]+?)"
KIND = "(?P<kind>models|datasets)"


class Hub:
    """Repositories in memory: files by name, by branch."""

    def __init__(self):
        self.branches = {}
        self.seen = {}  # files, by repository and commit, of the states that somebody asked for
        self.large = {}  # what was uploaded outside of commits, by checksum
        self.private = {}
        self.refused = {}  # by repository, the status and what the hub calls the reason
        self.asked = []
        self.url = ""

    def add(self, name, files, private=False):
        self.branches[name] = {"main": dict(files)}
        self.private[name] = private

    def commit_of(self, name, branch):
        digest = hashlib.sha1(f"{name} {branch}".encode())
        for path, data in sorted(self.branches[name][branch].items()):
            digest.update(path.encode() + hashlib.sha1(data).digest())
        return digest.hexdigest()

    def state_at(self, name, revision):
        """The commit that a branch or a commit is, and its files."""
        if revision in self.branches[name]:
            commit = self.commit_of(name, revision)
            self.seen[name, commit] = dict(self.branches[name][revision])
            revision = commit
        return revision, self.seen.get((name, revision))


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

        def do_PUT(self):
            self.answer("PUT")

        def answer(self, method):
            path = unquote(urlsplit(self.path).path)
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{method} {path}")
            for pattern, of_method, reply in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in of_method:
                    groups = found.groupdict()
                    if groups.pop("kind", None) == "datasets":
                        groups["name"] = f"datasets/{groups['name']}"
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
            name = f"datasets/{name}" if wanted.get("type") == "dataset" else name
            if name in hub.refused:
                return self.reply(hub.refused[name][0], b"{}", {"X-Error-Message": "not yours"})
            known = name in hub.branches
            if not known:
                hub.add(name, {}, private=wanted.get("private") or wanted.get("visibility") == "private")
            return self.reply_json({"url": f"{hub.url}/{name}"}, 409 if known else 200)

        def info(self, content, name, revision="main"):
            commit, files = hub.state_at(name, revision)
            if files is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.reply_json({"id": name, "sha": commit, "private": hub.private[name]})

        def tree(self, content, name, revision):
            _, files = hub.state_at(name, revision)
            return self.reply_json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
            )

        def resolve(self, content, name, revision, path):
            commit, files = hub.state_at(name, revision)
            etag = hashlib.sha1(files[path]).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
            return self.reply(200, files[path], headers)

        def branch(self, content, name, branch):
            hub.branches[name].setdefault(branch, {})
            return self.reply_json({})

        def preupload(self, content, name, revision):
            files = json.loads(content)["files"]
            return self.reply_json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for file in files
                    ]
                }
            )

        def places(self, content, name):
            objects = json.loads(content)["objects"]
            return self.reply_json(
                {"objects": [{**each, "actions": {"upload": {"href": f"{hub.url}/{each['oid']}"}}} for each in objects]}
            )

        def put(self, content, oid):
            assert hashlib.sha256(content).hexdigest() == oid
            hub.large[oid] = content
            return self.reply_json({})

        def commit(self, content, name, revision):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    hub.branches[name][revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    hub.branches[name][revision][line["value"]["path"]] = hub.large[line["value"]["oid"]]
            commit = hub.commit_of(name, revision)
            return self.reply_json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})

        def fine(self, content):
            return self.reply_json({"errors": [], "warnings": []})

    ROUTES = [
        ("/api/repos/create", ("POST",), Handler.create),
        ("/api/validate-yaml", ("POST",), Handler.fine),
        (f"/api/{KIND}/{REPOSITORY}", ("GET",), Handler.info),
        (f"/api/{KIND}/{REPOSITORY}/revision/(?P<revision>.+)", ("GET",), Handler.info),
        (f"/api/{KIND}/{REPOSITORY}/tree/(?P<revision>.+)", ("GET",), Handler.tree),
        (f"/api/{KIND}/{REPOSITORY}/branch/(?P<branch>.+)", ("POST",), Handler.branch),
        (f"/api/{KIND}/{REPOSITORY}/preupload/(?P<revision>.+)", ("POST",), Handler.preupload),
        (f"/api/{KIND}/{REPOSITORY}/commit/(?P<revision>.+)", ("POST",), Handler.commit),
        (
            f"/(?:(?P<kind>datasets)/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            ("GET", "HEAD"),
            Handler.resolve,
        ),
        (rf"/(?:(?P<kind>datasets)/)?{REPOSITORY}\.git/info/lfs/objects/batch", ("POST",), Handler.places),
        ("/(?P<oid>[0-9a-f]{64})", ("PUT",), Handler.put),
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
