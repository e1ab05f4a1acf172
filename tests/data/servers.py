"""Real servers on loopback for remote datasets: HTTP with ranges and faults on demand, and S3 by moto."""

from __future__ import annotations

import contextlib
import http.server
import logging
import threading
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Upload = Callable[[Path], str]


class FileServer(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults[NAME]` is a list that each request for NAME takes one item from:

    ("status", n): answer with that status; ("cut", n): end the body after n bytes; ("flip", n): flip a bit of byte n;
    ("whole", 0): answer without regard to the range asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.requests: list[tuple[str, int]] = []
        """(name, first byte asked for) of every request."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}/set"

    def count(self, name: str) -> int:
        return sum(name == asked for asked, _ in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        name = path.rpartition("/")[2]
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.server.requests.append((name, start))
        fault, number = self.server.faults[name].pop(0) if self.server.faults[name] else ("", 0)
        file = self.server.folder / name
        status = number if fault == "status" else 404 if not file.is_file() else 200
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = bytearray(file.read_bytes())
        if fault == "flip":
            content[number] ^= 0x10
        whole = len(content)
        if fault == "whole":
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        content = content[start:]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "cut":
            content = content[:number]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serve_s3() -> Iterator[Upload]:
    """A server with one bucket -> a function that copies a folder there and returns its location. Sets the environment by
    which boto3 finds the server."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        try:
            client = boto3.session.Session().client("s3")
            client.create_bucket(Bucket="bucket")

            def upload(folder: Path) -> str:
                for file in folder.iterdir():
                    client.put_object(Bucket="bucket", Key=f"some/set/{file.name}", Body=file.read_bytes())
                return "s3://bucket/some/set"

            yield upload
        finally:
            server.stop()
