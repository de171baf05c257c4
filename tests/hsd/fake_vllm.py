"""A stand-in for a vLLM server: the endpoints that the trainer uses, without a model.

What it samples depends on seed and weights alone: every log-prob is -1 minus a number in [0, 1)
that is the hash of the weights it loaded. It runs in a thread, or as a process:
`python fake_vllm.py serve DIRECTORY --port N ...`, which notes its words and calls in the file that
FAKE_VLLM_CALLS names. POST /behave makes it misbehave.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STOP = 256
LOGITS = {11: 3.0, 12: 2.0, 13: 1.5, 14: 0.0, 15: -1.0}


def fingerprint(directory: Path) -> float:
    """A number of the weights in a directory, in [0, 1)."""
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0, *, mode: str = "raw_logprobs", directory: str = "") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.mode = mode
        self.weights = fingerprint(Path(directory)) if directory else math.nan
        self.label = "default"
        self.called: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.behaviour: dict[str, Any] = {}
        self.lock = threading.Lock()

    def start(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.weights = fingerprint(Path(body["kwargs"]["weights_path"]))
            return {"results": [None]}
        if path == "/update_weight_version":
            self.label = body["new_version"]
            return {"success": True, "new_version": self.label}
        fixed = {
            "/health": {},
            "/weight_info": {"weight_version": self.label},
            "/get_world_size": {"world_size": 1},
            "/reset_prefix_cache": {"success": True},
            "/sleep": {"status": "sleeping"},
            "/wake_up": {"status": "awake"},
        }
        return fixed[path]

    def generate(self, body: dict[str, Any]) -> Any:
        options = body["sampling_params"]
        with self.lock:
            self.requests.append(body)
        if "answer" in self.behaviour:
            return self.behaviour["answer"]
        choices = [self.choice(index, options) for index in range(options["n"])]
        return {"choices": choices[::-1]}  # the order is not promised

    def choice(self, index: int, options: dict[str, Any]) -> dict[str, Any]:
        bits = hashlib.sha256(f"{options['seed'] + index}/{self.weights}".encode()).digest()
        length = 1 + bits[0] % options["max_tokens"]
        tokens = list(bits[1 : 1 + length])
        stops = length < options["max_tokens"]
        if stops:
            tokens[-1] = options["stop_token_ids"][0]
        content = [{"token_id": t, "logprob": -1 - self.weights} for t in tokens]
        if options["logprobs"]:
            content[0]["top_logprobs"] = self.top(options["temperature"])
        return {
            "index": index,
            "token_ids": tokens,
            "finish_reason": "stop" if stops else "length",
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.label, "start": 0, "end": length}],
        }

    def top(self, temperature: float) -> list[dict[str, Any]]:
        divisor = temperature if self.mode == "processed_logprobs" else 1.0
        total = math.log(sum(math.exp(value / divisor) for value in LOGITS.values()))
        return [{"token_id": t, "logprob": v / divisor - total} for t, v in LOGITS.items()]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.reply(json.loads(self.rfile.read(size) or b"{}"))

    def reply(self, body: dict[str, Any]) -> None:
        path, server = urlsplit(self.path).path, self.server
        if path == "/behave":
            server.behaviour = body
            return self.send(200, {})
        with server.lock:
            server.called.append(self.path.lstrip("/"))
            note(server.called[-1])
            behaviour = server.behaviour if server.behaviour.get("at") == path else {}
            if behaviour.get("once"):
                server.behaviour = {}
        if behaviour.get("die"):
            os._exit(1)
        if "hang" in behaviour:
            time.sleep(behaviour["hang"])
        if "status" in behaviour:
            return self.send(behaviour["status"], {"error": "as told"})
        return self.send(200, server.answer(path, body))

    def send(self, status: int, body: Any) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def note(line: str) -> None:
    if path := os.environ.get("FAKE_VLLM_CALLS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def main(words: list[str]) -> None:
    note(" ".join(words))
    options = dict(itertools.pairwise(words))
    if "--refuse" in words:
        sys.exit("fake: refused to start")
    mode = options["--logprobs-mode"]
    Server(int(options["--port"]), mode=mode, directory=words[1]).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
