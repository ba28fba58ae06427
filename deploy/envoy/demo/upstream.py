#!/usr/bin/env python3
"""What stands behind the gateway in `scripts/run --with-envoy`: an application and a language model.

POST /v1/chat/completions answers in the form of the OpenAI API, streamed or whole, with the tokens
that it used; a word counts as one. Every other path answers what it was told about who calls.

    upstream.py [PORT]      prints where it listens; port 0, or none: a free one
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "demo-model"

ANSWER = (
    "A toll keeper stands where the road narrows and looks at everyone who comes by. "
    "Who are you, and how far may you still go? Those who have a token may pass, and what they "
    "carry is counted once, however often they ask. Those who have used up theirs are told when "
    "to come back."
).split()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.told()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path.partition("?")[0] != "/v1/chat/completions":
            self.told()
            return
        try:
            asked = json.loads(body)
            words = [word for message in asked["messages"] for word in message["content"].split()]
            answer = ANSWER[: int(asked.get("max_tokens") or len(ANSWER))]
        except (ValueError, TypeError, KeyError) as error:
            self.answer(400, {"error": {"message": f"not understood: {error!r}"}})
            return
        usage = {
            "prompt_tokens": len(words),
            "completion_tokens": len(answer),
            "total_tokens": len(words) + len(answer),
        }
        if asked.get("stream"):
            self.stream(answer, usage)
        else:
            message = {"role": "assistant", "content": " ".join(answer)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(200, {"model": MODEL, "choices": [choice], "usage": usage})

    def stream(self, answer, usage):
        """Word by word, as server-sent events; the last but one has the usage."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for word in answer:
            choice = {"index": 0, "delta": {"content": f"{word} "}}
            self.event(json.dumps({"model": MODEL, "choices": [choice]}))
            time.sleep(0.01)
        self.event(json.dumps({"model": MODEL, "choices": [], "usage": usage}))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data):
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.flush()

    def told(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        who = {name: headers[name] for name in sorted(headers) if name.startswith("x-user-")}
        self.answer(200, {"path": self.path, "who": who})

    def answer(self, status, body):
        text = (json.dumps(body) + "\n").encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def main():
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    print("127.0.0.1:%d" % server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
