"""A server that speaks the chat-completions protocol, as scripted by a test."""
import collections
import contextlib
import http.server
import json
import re
import threading
import time

KEY = "sk-test-0123456789"
PROMPT = "a red cat on a garden wall, evening light, watercolour, soft warm colours"
REPLY = {"request": "draw my cat", "answer": "Here is your cat.", "prompt": PROMPT}


def completion(content, usage=(100, 50), finish="stop"):
  """The body of an answer."""
  body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [
      {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}]}
  if usage:
    body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1],
                     "total_tokens": sum(usage)}
  return body


def error(message, **fields):
  return {"error": {"message": message, "type": "t", "code": None, **fields}}


class Stub:
  """`answer(call)` gives (status, body, headers), "drop" to cut the connection, or None: a usable
  reply.  `calls` are the requests so far: path, auth, body, name (the word behind "item"), nth."""

  def __init__(self):
    self.calls, self.answered, self.answer = [], collections.Counter(), lambda call: None
    self.clock = time.monotonic
    lock, stub = threading.Lock(), self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        name = ([""] + re.findall(r"item (\w+)", text))[-1]
        with lock:
          nth = sum(call.name == name for call in stub.calls)
          call = Call(self.path, self.headers["Authorization"], body, name, nth, stub.clock())
          stub.calls.append(call)
        result = stub.answer(call) or (200, completion(json.dumps(
            {**REPLY, "request": f"draw item {name}"})), {})
        if self.path != "/v1/chat/completions":
          result = 404, error("no such route"), {}
        elif call.auth != f"Bearer {KEY}":
          result = 401, error(f"Incorrect API key provided: {call.auth}"), {}
        if result == "drop":
          self.close_connection = True
          return
        status, body, headers = result
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for header in {"Content-Type": "application/json", "Content-Length": str(len(data)),
                       **headers}.items():
          self.send_header(*header)
        self.end_headers()
        with contextlib.suppress(OSError):
          self.wfile.write(data)
          stub.answered[name] += status == 200

      def log_message(self, *_): ...

    class Server(http.server.ThreadingHTTPServer):
      daemon_threads = True

      def handle_error(self, *_): ...  # clients that hang up

    self._server = Server(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
    threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

  @property
  def names(self):
    return [call.name for call in self.calls]

  def close(self):
    self._server.shutdown()
    self._server.server_close()


Call = collections.namedtuple("Call", "path auth body name nth time")
