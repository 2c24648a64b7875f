"""Shards as the library webdataset writes them, and a server for them that counts, and fails when told to."""

import io
import json
import threading
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import webdataset
from PIL import Image


def png(level, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def write_shard(path, samples):
    """Write samples, mappings from endings to contents, under their keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, contents in samples.items():
            writer.write({"__key__": key, **contents})
    return path


def write_index(path, shards, **more):
    """Write an index as wids does, of (URL, number of samples)."""
    rows = [{"url": url, "nsamples": samples} for url, samples in shards]
    path.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": rows, **more}))
    return path


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.gets[name] += 1
        if self.server.failures[name] > 0:
            self.server.failures[name] -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *words):
        pass


@contextmanager
def served(folder):
    """A server of a folder: `url`, the `gets` of each file, and how many `failures` are still to come of each."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.gets = Counter()
        server.failures = Counter()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
