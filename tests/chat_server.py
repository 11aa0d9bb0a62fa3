"""A small real HTTP server that speaks what evomerge asks of an OpenAI-compatible one, and fails on
demand.
"""

import gzip
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def usual(prompt):
    """The server's answer to a prompt, which tests can compute as well: the characters reversed."""
    return prompt[::-1]


class Quiet(ThreadingHTTPServer):
    """A client that hangs up is no error of the server's, and stderr is under test."""

    def handle_error(self, request, client_address):
        pass


class Server:
    """`models` is the list (None: there is no such page), or an action. `plan(number, prompt)`,
    asked for every question (counted from 0), gives None for a usual answer, a dict of changes to
    it, or an action: status(…), raw(…), torn(), drip(…), endless(), packed(…).
    """

    def __init__(self, models=("m",), plan=lambda number, prompt: None, seconds=0.0, known=None):
        self.models, self.plan, self.seconds = models, plan, seconds
        self.known = known  # a model's names, where others are refused: (names, action)
        # (path, body, headers); prompts answered with status 200
        self.asked, self.answered = [], Counter()
        self.now = self.most = 0  # requests under way
        self.lock = threading.Lock()

    @contextmanager
    def running(self, port=0):
        """Gives the URL; on leaving, the port is closed."""
        self.http = Quiet(("127.0.0.1", port), handler(self))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            self.http.shutdown()
            self.http.server_close()

    def prompts(self):
        return [prompt_of(body) for path, body, _ in self.asked if path != "/v1/models"]


def status(code, message="broken", body=None, **headers):
    data = json.dumps(
        body if body is not None else {"error": {"message": message, "type": "error", "code": code}}
    ).encode()
    return lambda h: h.reply(code, data, {k.replace("_", "-"): v for k, v in headers.items()})


def raw(data, kind="application/json"):
    return lambda h: h.reply(200, data, {"Content-Type": kind})


def torn():
    def tear(h):
        h.send_response(200)
        h.send_header("Content-Type", "application/json")
        h.send_header("Content-Length", "1000")
        h.end_headers()
        h.wfile.write(b'{"choices": [{"mess')
        h.wfile.flush()
        h.close_connection = True

    return tear


def drip(part, every=0.05):
    """A reply whose head or body comes a byte now and then, and never ends."""

    def send(h):
        with suppress(OSError):
            h.wfile.write(b"HTTP/1.1 200 OK\r\n")
            if part == "body":
                h.wfile.write(b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            for byte in b"X-Header: 0123456789" * 5000:
                h.wfile.write(bytes([byte]))
                h.wfile.flush()
                time.sleep(every)
        h.close_connection = True

    return send


def endless(code=200):
    """Chunks of blanks without end; they are counted in `sent`."""

    def send(h):
        h.send_response(code)
        h.send_header("Content-Type", "application/json")
        h.send_header("Transfer-Encoding", "chunked")
        h.end_headers()
        chunk = b" " * 2**20
        with suppress(OSError):
            while True:
                h.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                send.sent += len(chunk)
        h.close_connection = True

    send.sent = 0
    return send


def packed(data):
    """The data as gzip, whatever was asked for."""
    kinds = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    return lambda h: h.reply(200, gzip.compress(data), kinds)


def prompt_of(body):
    return (
        body["prompt"]
        if "prompt" in body
        else "\n".join(f"{m['role']}: {m['content']}" for m in body["messages"])
    )


def handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.asked.append((self.path, None, self.lower()))
            if self.path != "/v1/models" or server.models is None:
                return status(404, "Not Found")(self)
            if callable(server.models):
                return server.models(self)
            return self.json(
                {"object": "list", "data": [{"id": m, "object": "model"} for m in server.models]}
            )

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = sum(path != "/v1/models" for path, _, _ in server.asked)
                server.asked.append((self.path, body, self.lower()))
                server.now += 1
                server.most = max(server.most, server.now)
            try:
                time.sleep(server.seconds)
                self.answer(number, body)
            finally:
                with server.lock:
                    server.now -= 1

        def answer(self, number, body):
            if self.path not in ("/v1/chat/completions", "/v1/completions"):
                return status(404, "Not Found")(self)
            if server.known is not None and body["model"] not in server.known[0]:
                return server.known[1](self)
            prompt = prompt_of(body)
            what = server.plan(number, prompt)
            if callable(what):
                return what(self)
            found = {"text": usual(prompt), "finish_reason": "stop"} | (what or {})
            choice = {"index": 0, "finish_reason": found["finish_reason"]}
            choice |= (
                {"text": found["text"]}
                if "prompt" in body
                else {"message": {"role": "assistant", "content": found["text"]}}
            )
            with server.lock:
                server.answered[prompt] += 1
            return self.json(
                {
                    "id": "x",
                    "object": "o",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                    "usage": USAGE | found.get("usage", {}),
                }
            )

        def lower(self):
            return {name.lower(): value for name, value in self.headers.items()}

        def json(self, value):
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def reply(self, code, data, headers):
            self.send_response(code)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    return Handler


USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
