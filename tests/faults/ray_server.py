"""The fake Ray of tests/fakes.py as an HTTP server of its own address, for a control plane in another process."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any

import httpx2

from tests.fakes import FakeRay


@contextmanager
def ray_server(ray: FakeRay) -> Iterator[str]:
    """Serve Ray's API on loopback until the block ends; give its URL.

    One request is carried out at a time. One whose reply gets lost is carried out, and the connection then closed.
    """
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: the second of two would wait for the client's acknowledgement

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:  # the client died in the middle of it
                self.close_connection = True
                return
            try:
                with one_at_a_time:
                    reply = ray.handle(httpx2.Request(self.command, f"http://ray{self.path}", content=body))
            except httpx2.TransportError:
                self.close_connection = True
                return
            self.send_response_only(reply.status_code)
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True, name="fake Ray").start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that was killed resets its connections
            super().handle_error(request, client_address)
