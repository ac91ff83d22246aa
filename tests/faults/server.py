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

PATIENCE = 180.0
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """``mlflow server`` on a database and artifacts in a folder, which can be ended and started again.

    Attributes:
        port: That it listens on, each time the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start the server; with ``wait``, until it answers."""
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        stores += ["--artifacts-destination", str(self.folder / "kept")]
        log_path = self.folder / "server.log"
        with log_path.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *address, *stores],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while wait and not _healthy(self.port):
            assert self._process.poll() is None and time.monotonic() < deadline, log_path.read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """End the server and its worker at once."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    """Run ``mlflow server`` on a database and artifacts in a folder."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


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
        try:
            status, headers, content = self._forward(request, body)
        except (OSError, http.client.HTTPException):  # the server itself is away
            self._send(request, 502, {"Content-Type": "text/plain"}, b"the server does not answer")
            return
        if mode == "lose":
            request.close_connection = True
            return
        self._send(request, status, headers, content)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Pass a request on; return the answer's status, headers and content."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.target, timeout=PATIENCE)
        headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP | {"host"}}
        try:
            upstream.request(request.command, request.path, body, {**headers, "Host": f"127.0.0.1:{self.target}"})
            answer = upstream.getresponse()
            kept = {key: value for key, value in answer.getheaders() if key.lower() not in HOP}
            return answer.status, kept, answer.read()
        finally:
            upstream.close()

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        try:
            request.send_response(status)
            for key, value in headers.items():
                request.send_header(key, value)
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            request.wfile.write(content)
        except OSError:  # the client has given up waiting
            request.close_connection = True
