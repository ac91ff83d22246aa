"""A real MLflow server, and a proxy in front of it that fails as told."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests

PATIENCE = 60.0
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path) -> Iterator[int]:
    """Run ``mlflow server`` on a database and artifacts in a folder; yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "kept")]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([*command, *stores], stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its worker, too; nothing of it is needed
        process.wait(PATIENCE)


def _healthy(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=2).ok
    except requests.RequestException:
        return False


class Proxy:
    """Passes requests on to a server, unless it is told to fail.

    Attributes:
        mode: ``pass``; a status to answer with; ``drop`` closes connections without an answer; ``lose`` passes a
            request on and drops the answer.
        delay: Seconds before every answer.
        seen: Paths of all requests.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.mode: str | int = "pass"
        self.delay = 0.0
        self.seen: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                proxy.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a request as told."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.seen.append(request.path)
        time.sleep(self.delay)
        mode = self.mode
        if mode == "drop":
            request.close_connection = True
            return
        if isinstance(mode, int):
            self._send(request, mode, {"Content-Type": "text/plain"}, b"told to fail")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.target, timeout=PATIENCE)
        headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP | {"host"}}
        upstream.request(request.command, request.path, body, {**headers, "Host": f"127.0.0.1:{self.target}"})
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if mode == "lose":
            request.close_connection = True
            return
        kept = {key: value for key, value in answer.getheaders() if key.lower() not in HOP}
        self._send(request, answer.status, kept, content)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
