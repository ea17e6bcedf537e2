"""A local server with OpenAI's chat interface, for tests and for trying notebooks 08b
and 09 without a key. It is no language model: it reads the facts in the patient's
instructions and answers by rule, and it grades by rule. It can be slow, it can fail in
many ways on purpose, and it can refuse what other servers take (`--refuses`).

    python tests/chat_server.py --port 8765 --latency 0.2 --faults 0.3
"""

import argparse
import json
import os
import random
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpodx_utils as gx

FAULTS = (
    "429",
    "500",
    "hang",
    "drop",
    "no json",
    "no choices",
    "empty",
    "out of range",
)
KEY = "sk-local-test-key"
REFUSALS = {  # what a server may refuse, and the words of real ones
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this "
    "model. Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0.7 with this "
    "model. Only the default (1) value is supported.",
    "json_schema": "This response_format type is unavailable now",
    "json_object": "This model does not support response format `json_object`.",
    "system": "Conversation roles must alternate user/assistant/user/assistant/...",
}
STYLES = {  # how an answer may come
    "parts": lambda text: [
        {"type": "reasoning", "text": "It is influenza."},
        {"type": "text", "text": text[:4]},
        {"type": "text", "text": text[4:]},
    ],
    "words": lambda text: (
        f"Here {{it}} is:\n```json\n{text}\n```\nI hope it {{helps}}."
    ),
    "extra": lambda text: json.dumps({**json.loads(text), "confidence": 0.9}),
    "long reason": lambda text: text.replace(
        '"reason": "', '"reason": "' + "so " * 999
    ),
    "half emoji": lambda text: text[:-2] + " \ud83d" + text[-2:],
    "half emoji in JSON": lambda text: text.replace("named", "\\ud83d named"),
    "endless": lambda text: "No, I don't have a cough. " * 4000,
    "one word": lambda text: "x" * 100_000,
}


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512

    def __init__(
        self, port=0, latency=0.0, faults=0.0, hang=3.0, seed=0, key=None, only=None,
        refuses=(), mute=False, style=None, thinks=0, needs_schema=False,
    ):  # fmt: skip
        super().__init__(("127.0.0.1", port), Handler)
        self.latency, self.faults, self.hang, self.key = latency, faults, hang, key
        self.random, self.lock, self.bank = (
            random.Random(seed),
            threading.Lock(),
            gx.load_bank(),
        )
        self.met, self.only = (
            dict.fromkeys(FAULTS, 0),
            only,
        )  # `only`: always this fault
        self.requests = 0
        # Refuses these (`mute`: without naming them); answers in this style; thinks for
        # so many tokens first; answers in JSON only if the schema stands in the prompt.
        self.refuses, self.mute, self.style = refuses, mute, style
        self.thinks, self.needs_schema = thinks, needs_schema
        self.refused, self.bodies = 0, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that hung up is part of the game

    def refusal(self, body):
        """The first thing in a request that this server does not take."""
        shape = body.get("response_format", {}).get("type")
        has = {
            "max_tokens": "max_tokens" in body,
            "temperature": body.get("temperature", 1) != 1,
            "system": any(m["role"] == "system" for m in body["messages"]),
        }
        return next((x for x in self.refuses if has.get(x, shape == x)), None)

    def answer(self, body):
        system = body["messages"][0]["content"]
        last = body["messages"][-1]["content"]
        if len(body["messages"]) == 1:  # instructions before the question
            system, _, last = last.rpartition("\n\n")
        in_prompt = re.search(r"JSON schema\D*?(\{.*\})", system)
        shape = body.get("response_format", {}).get("json_schema", {}).get("schema")
        shape = json.loads(in_prompt[1]) if in_prompt else shape
        if self.needs_schema and shape and not in_prompt:
            return "The trainee did well."
        if system.startswith("You test") and shape:
            types = {name: x["type"] for name, x in shape["properties"].items()}
            return json.dumps(
                {n: "named" if t == "string" else 0 for n, t in types.items()}
            )
        if system.startswith("You play a patient"):
            return self.patient(system, last)
        if system.startswith("You grade"):
            return self.judge(json.loads(last))
        if system.startswith("You review"):
            return self.critic(json.loads(last))
        return "yes"

    def patient(self, facts, question):
        lexicon = self.bank.lexicon
        asked = [lexicon.symptoms[s] for s in lexicon.find(question)]
        if asked:
            return " ".join(s.yes if s.complaint in facts else s.no for s in asked)
        age, sex, since = re.search(
            r"You are (\d+) years old, (\w+)\. (.*)", facts
        ).groups()
        about = {"old": f"I am {age} years old.", "male": f"I am {sex}."}
        about |= dict.fromkeys(("long", "start", "began"), since)
        said = gx.words(question)
        return next((about[w] for w in said if w in about), gx.ScriptedPatient.UNSURE)

    def judge(self, case):
        asked = [x["doctor"] for x in case["consultation"][1:]]
        named = gx.read_turn(asked[-1]).diagnosis or ""
        found = gx.match_disease(self.bank, named)
        truth = case["true disease"]
        same = bool(found) and self.bank[found].system == self.bank[truth].system
        new = len(set(asked)) / len(asked)
        right = 1.0 if found == truth else 0.4 * same
        why = f"named {found}, true is {truth}"
        return json.dumps({"diagnosis": right, "questions": new, "reason": why})

    def critic(self, case):
        """Sees repeated questions and nothing else."""
        asked = [x["doctor"] for x in case["consultation"][1:]]
        for turn, question in enumerate(asked, 1):
            if question in asked[: turn - 1]:
                what = f"Turn {turn} told nothing new."
                return f"{what} Ask: Have you noticed anything else?"
        return "None."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests += 1
            fault = server.only
            if server.random.random() < server.faults:
                fault = server.random.choice(FAULTS)
                server.met[fault] += 1
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            sent = self.headers.get("Authorization")
            return self.send(
                401, json.dumps({"error": {"message": f"Bad key: {sent}"}})
            )
        if self.path != "/v1/chat/completions":
            return self.send(404, json.dumps({"detail": "Not Found"}))
        if what := server.refusal(body):
            server.refused += 1
            said = "Bad Request" if server.mute else REFUSALS[what]
            said = f"{said} ({self.headers.get('Authorization')})"
            return self.send(400, json.dumps({"error": {"message": said}}))
        server.bodies.append(body)
        if body["model"] == "missing":
            return self.send(404, json.dumps({"error": {"message": "no such model"}}))
        time.sleep(server.hang if fault == "hang" else server.latency)
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        if fault in ("429", "500"):
            return self.send(int(fault), json.dumps({"error": {"message": fault}}))
        if fault == "no json":
            return self.send(200, "<html>busy</html>")
        text = server.answer(body)
        if fault == "out of range":
            text = json.dumps({"diagnosis": 7, "questions": -1, "reason": "x"})
            text = text if "response_format" in body else ""
        text = "" if fault == "empty" else text
        room = body.get("max_tokens") or body.get("max_completion_tokens") or 10**6
        choice = {"index": 0, "finish_reason": "stop"}
        text = "<think>It may be " * room if room < server.thinks else text
        if len(text) > 4 * room:
            text, choice["finish_reason"] = text[: 4 * room], "length"
        content = STYLES[server.style](text) if server.style else text
        choice["message"] = {"role": "assistant", "content": content}
        read = sum(len(m["content"]) for m in body["messages"]) // 4
        usage = {"prompt_tokens": read, "completion_tokens": len(text) // 4}
        usage["total_tokens"] = sum(usage.values())
        out = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
        }
        out |= {"choices": [] if fault == "no choices" else [choice], "usage": usage}
        self.send(200, json.dumps(out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument(
        "--faults", type=float, default=0.0, help="share of bad answers"
    )
    parser.add_argument(
        "--with-parent", action="store_true", help="end when stdin closes"
    )
    parser.add_argument(
        "--refuses", default="", help=f"some of {','.join(REFUSALS)}, with commas"
    )
    args = parser.parse_args()
    if args.with_parent:
        end = threading.Thread(
            target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True
        )
        end.start()
    refuses = [x for x in args.refuses.split(",") if x]
    server = Server(args.port, args.latency, args.faults, refuses=refuses)
    print(server.url, flush=True)
    server.serve_forever()
