"""An OpenAI-compatible server on loopback that answers by a script, and replies for it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from interp.conflict.rubrics import DIMENSIONS


def completion(content: Any, finish: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }  # fmt: skip


def scores(*values: Any) -> dict[str, Any]:
    found = {
        name: {"justification": f"{name} is so", "score": value} for name, value in zip(DIMENSIONS, values, strict=True)
    }
    return completion(json.dumps(found))


RUBRIC = completion(
    json.dumps({"levels": {name: {str(at): f"{name} {at}" for at in range(1, 6)} for name in DIMENSIONS}})
)
GOOD = scores(4, 3, 5, 1)
# What a script may hold: a reply; (status, body[, headers]); a function of the request's body that gives one of these.
Step = dict[str, Any] | tuple[Any, ...] | Callable[[dict[str, Any]], Any]


class Scripted:
    """An OpenAI-compatible server that answers by a script, and by its last line for ever."""

    def __init__(self) -> None:
        self.script: list[Step] = [GOOD]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.now, self.most = 0, 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    at = len(server.bodies)
                    server.bodies.append(body)
                    server.keys.append(self.headers["Authorization"])
                    server.times.append(time.monotonic())
                    step = server.script[min(at, len(server.script) - 1)]
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    given = step(body) if callable(step) else step
                    status, reply, headers = (200, given, {}) if isinstance(given, dict) else (*given, {})[:3]
                    text = reply if isinstance(reply, str) else json.dumps(reply)
                    packed = text.encode()
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self.send_response(status)
                        kind = "text/html" if isinstance(reply, str) else "application/json"
                        for name, value in {
                            "Content-Type": kind,
                            "Content-Length": str(len(packed)),
                            **headers,
                        }.items():
                            self.send_header(name, value)
                        self.end_headers()
                        self.wfile.write(packed)
                finally:
                    with server._lock:
                        server.now -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
