#!/usr/bin/env python3
"""The tour of the gateway that `scripts/run --with-envoy` starts: by curl, as anybody would.

A user registers and logs in by REST, has an answer streamed, sees it charged, and is refused when
nothing is left. Prints every call; exit code 1 at the first surprise.
"""

import argparse
import json
import secrets
import shlex
import subprocess
import time

from tour import Surprise, Tollkeeper, expect, first_run, step

PROMPT = "What does a toll keeper do?"


class Answer:
    """What curl printed: status, headers by name, body."""

    def __init__(self, output):
        head, _, self.body = output.partition("\r\n\r\n")
        status, *lines = head.split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    def json(self, status=200):
        expect("the status", self.status, status)
        return json.loads(self.body)


def curl(url, token="", body=None, *more):
    """Calls, and shows the call as anybody may repeat it."""
    words = ["curl", *more]
    if token:
        words += ["-H", "authorization: Bearer $TOKEN"]
    if body is not None:
        words += ["-H", "content-type: application/json", "-d", json.dumps(body)]
    words.append(url)
    shown = (f'"{word}"' if "$" in word else shlex.quote(word) for word in words)
    print("    " + " ".join(shown), flush=True)
    words = [word.replace("$TOKEN", token) for word in words]
    words += ["-sS", "-i", "--max-time", "20"]
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode:
        raise Surprise(f"curl: {done.stderr.decode().strip()}")
    return Answer(done.stdout.decode())


def streamed(answer):
    """The text and the usage of an answer in server-sent events."""
    expect("the status", answer.status, 200)
    expect("the type", answer.headers["content-type"], "text/event-stream")
    events = [line[6:] for line in answer.body.splitlines() if line.startswith("data: ")]
    expect("the last event", events[-1], "[DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    words = [choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(words), next(chunk["usage"] for chunk in chunks if "usage" in chunk)


def tour(edge, service, admin_identifier, admin_password):
    name = f"edge-{secrets.token_hex(4)}"
    password = secrets.token_urlsafe(18)
    chat = {"model": "demo-model", "stream": True, "messages": [{"role": "user", "content": PROMPT}]}

    with step("ask for its health") as notes:
        notes.append(curl(f"{edge}/health").json()["status"])

    with step("register by REST") as notes:
        body = {
            "email": f"{name}@example.com",
            "username": name,
            "full_name": "At the Edge",
            "password": password,
        }
        user = curl(f"{edge}/api/auth/register", body=body).json()["user"]
        notes += [name, f"tier {user['tier']}"]

    with step("log in by REST") as notes:
        body = {"identifier": name, "password": password}
        tokens = curl(f"{edge}/api/auth/login", body=body).json()["tokens"]
        token = tokens["access_token"]
        notes.append(f"TOKEN={token[:12]}… until {tokens['access_token_expires_at']}")

    with step("who am I") as notes:
        me = curl(f"{edge}/api/auth/me", token).json()["user"]
        expect("the user", me["id"], user["id"])
        notes.append(me["email"])

    with step("the application is told") as notes:
        told = curl(f"{edge}/hello", token, None, "-H", "x-user-id: somebody-else")
        told = told.json()["who"]
        expect("the user", told["x-user-id"], user["id"])
        notes.append(f"x-user-id {told['x-user-id']}, whatever the client says")

    with step("have an answer streamed") as notes:
        text, usage = streamed(curl(f"{edge}/v1/chat/completions", token, chat, "-N"))
        notes.append(f"“{text[:48]}…”, {usage['total_tokens']} tokens")

    with step("it is charged, once") as notes:
        wanted = {"input": usage["prompt_tokens"], "output": usage["completion_tokens"]}
        deadline = time.monotonic() + 10
        while True:
            # The gateway tells at the end of a stream and does not wait, so it shows a moment later.
            totals = curl(f"{edge}/api/usage/monthly", token).json()["totals"]
            used = {key: int(totals["tokens"][key]) for key in wanted}
            if used == wanted or time.monotonic() > deadline:
                break
            time.sleep(0.3)
        expect("what is charged", used, wanted)
        expect("the number of requests", totals["request_count"], "1")
        notes.append(", ".join(f"{key} {value}" for key, value in used.items()))

    with step("give the user 500 tokens") as notes:
        login = {"identifier": admin_identifier, "password": admin_password}
        login = service.call("auth.v1.AuthService/Login", **login)
        override = {"user_id": user["id"], "monthly_tokens": 500, "reason": "tour"}
        service.call("admin.v1.AdminService/SetQuotaOverride", login.tokens.access_token, **override)
        notes.append("by an administrator, with gRPC")

    with step("over quota is 429") as notes:
        answer = curl(f"{edge}/v1/chat/completions", token, chat, "-N")
        problem = answer.json(429)
        expect("the code", problem["code"], "QUOTA_EXCEEDED")
        notes += [problem["code"], f"RateLimit {answer.headers['ratelimit']}"]

    with step("without a token it is 401") as notes:
        problem = curl(f"{edge}/v1/chat/completions", body=chat).json(401)
        notes.append(f"{problem['code']}, request {problem['request_id']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--edge", default="http://127.0.0.1:10000", help="URL of the gateway")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port of the service")
    parser.add_argument("--first-run", metavar="FILE", required=True, help="administrator's login")
    args = parser.parse_args()
    known = first_run(args.first_run)
    tour(args.edge, Tollkeeper(args.address), known["admin_email"], known["admin_password"])


if __name__ == "__main__":
    main()
