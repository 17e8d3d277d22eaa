"""Process functions: commands and servers in the watchdog's contract, as a GPU process runs them."""

from __future__ import annotations

import json
import sys

import pytest

from hotset.errors import FunctionError
from hotset.functions.http_envelope import REQUEST, RESPONSE, RequestHead, pack, unpack_request, unpack_response
from hotset.functions.process import ProcessRuntime, ProcessSettings
from hotset.node.worker.memory import children_bytes

SERVER = """
import http.server, json, os, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/exit":
            os._exit(3)
        if self.path == "/slow":
            time.sleep(60)
        if self.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b"one", b"two"):
                self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(piece), piece))
            self.wfile.write(b"0\\r\\n\\r\\n")
            return
        seen = {"path": self.path, "body": body.decode(), "tone": self.headers.get("x-tone")}
        answer = json.dumps(seen).encode()
        self.send_response(302 if self.path == "/away" else 201)
        self.send_header("Location", "/there")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self):
        self.send_response(200 if self.path == "/healthy" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def request(method="POST", path="/", query="", body=b"", **headers) -> bytes:
    head = RequestHead(method, path, query, [(name.replace("_", "-"), value) for name, value in headers.items()])
    return pack(head, body)


def answer(outcome) -> tuple[int, dict[str, str], bytes]:
    assert outcome.content_type == RESPONSE
    head, body = unpack_response(outcome.body)
    return outcome.status, dict(head.headers), bytes(body)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "serve.py").write_text(SERVER)
    env = {"fprocess": f"{sys.executable} serve.py $PORT", "ready_path": "/healthy", "exec_timeout": "0.3"}
    runtime = ProcessRuntime("echo", str(tmp_path), "cpu", env)
    runtime.load()
    yield runtime
    runtime.unload()


def test_a_server_is_started_called_and_stopped(server):
    status, headers, body = answer(call(server, request(path="/a/b", query="c=d", body=b"hello", x_tone="warm")))
    assert (status, headers["Location"]) == (201, "/there")
    assert json.loads(body) == {"path": "/a/b?c=d", "body": "hello", "tone": "warm"}
    assert answer(call(server, request(path="/away")))[0] == 302
    assert children_bytes() > 1 << 20
    process = server._server
    server.unload()
    assert process.returncode is not None


def test_a_servers_stream_is_passed_on_as_it_comes(server):
    outcome = call(server, request(path="/stream"))
    first, *rest = list(outcome.stream)
    assert unpack_response(first)[1] == b""
    assert b"".join(rest) == b"onetwo"


def test_a_server_that_is_too_slow_is_a_504_and_one_that_is_gone_takes_the_process_along(server):
    status, headers, body = answer(call(server, request(path="/slow")))
    assert (status, headers["x-openfaas-internal"]) == (504, "hotset")
    assert b"longer than the 0.3 s" in body
    assert b"longer than the 0.05 s" in answer(call(server, request(path="/slow", x_timeout="50ms")))[2]
    assert b"longer than the 0.3 s" in answer(call(server, request(path="/slow", x_timeout="1h")))[2]
    status, _, body = answer(call(server, request(path="/slow", x_timeout="soon")))
    assert (status, b"X-Timeout is 'soon'" in body) == (400, True)
    server.unload()
    server.load()
    with pytest.raises(SystemExit):
        call(server, request(path="/exit"))


def test_a_server_that_ends_before_it_answers_fails_its_load(tmp_path):
    runtime = ProcessRuntime("false", str(tmp_path), "cpu", {"fprocess": "false", "mode": "http"})
    with pytest.raises(FunctionError, match="ended with code 1"):
        runtime.load()


def test_a_command_is_run_for_each_call_with_the_request_in_its_environment(tmp_path, capfd):
    runtime = ProcessRuntime("env", str(tmp_path), "cpu", {"fprocess": "env", "custom_env": "test value"})
    runtime.load()
    sent = request("PUT", "/x", "testing=1", b"", content_type="text/csv", x_a_b="1", x_bad="a\0b")
    status, headers, body = answer(call(runtime, sent))
    assert (status, headers["content-type"]) == (200, "text/csv")
    lines = body.decode().splitlines()
    for line in ("Http_Method=PUT", "Http_Path=/x", "Http_Query=testing=1", "Http_X_A_B=1", "custom_env=test value"):
        assert line in lines
    assert not any(line.startswith("Http_X_Bad") for line in lines)
    log = [line.lstrip("0123456789/: ") for line in capfd.readouterr().err.splitlines()]
    assert log[0].startswith("Forking fprocess")
    assert log[1].startswith(f"Wrote {len(body)} Bytes")
    runtime.unload()


def test_a_commands_input_is_the_body_and_its_secrets_are_where_it_looks(tmp_path):
    (tmp_path / "token").write_bytes(b"abc\n")
    cat = ProcessRuntime("cat", str(tmp_path), "cpu", {"fprocess": "cat"})
    assert answer(cat.call_batch([request_call(b"some body")])[0])[2] == b"some body"
    env = {"fprocess": "cat /var/openfaas/secrets/token", "secret_mount_path": str(tmp_path)}
    assert answer(call(ProcessRuntime("cat", str(tmp_path), "cpu", env), request()))[2] == b"abc\n"


def request_call(body: bytes):
    from hotset.functions.runtime import Call

    return Call(request(body=body), REQUEST)


def call(runtime: ProcessRuntime, body: bytes):
    return runtime.call(body, REQUEST)


def test_other_protocols_are_told_so_and_may_still_have_it_loaded(tmp_path):
    runtime = ProcessRuntime("env", str(tmp_path), "cpu", {"fprocess": "env"})
    assert runtime.call(b"", "application/vnd.hotset.v2; warm").status == 200
    refused = runtime.call(b"{}", "application/json")
    assert (refused.status, b"speaks HTTP only" in refused.body) == (400, True)


@pytest.mark.parametrize(("command", "status"), [("false", 500), ("sleep 60", 504)])
def test_a_command_that_fails_or_takes_too_long_says_so(tmp_path, command, status):
    runtime = ProcessRuntime("bad", str(tmp_path), "cpu", {"fprocess": command, "exec_timeout": "50ms"})
    found, headers, _ = answer(call(runtime, request()))
    assert (found, headers["x-openfaas-internal"]) == (status, "hotset")


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({}, "fprocess is empty"),
        ({"fprocess": "'"}, "cannot be read"),
        ({"fprocess": "env", "upstream_url": "http://127.0.0.1:99999"}, "cannot be read"),
        ({"fprocess": "no-such-command-anywhere"}, "neither in the image nor"),
        ({"fprocess": "env", "exec_timeout": "soon"}, "exec_timeout"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, env, problem):
    with pytest.raises(FunctionError, match=problem):
        ProcessRuntime("bad", str(tmp_path), "cpu", env)


def test_how_a_command_is_called_follows_from_what_it_says():
    def serves(**env: str) -> bool:
        return ProcessSettings.read({"fprocess": "python index.py", **env}).serves

    assert not serves()
    assert not serves(mode="streaming", upstream_url="http://127.0.0.1:5000")
    assert serves(mode="http")
    assert serves(upstream_url="http://127.0.0.1:5000")
    assert serves(fprocess="serve --port $PORT")


@pytest.mark.parametrize("envelope", [b"", b"\0\0", b"\0\0\0\x09{}", b"\0\0\0\x02[]"])
def test_a_broken_envelope_is_told_apart(envelope):
    with pytest.raises(ValueError):
        unpack_request(envelope)
    if envelope[-1:] != b"]":
        with pytest.raises(ValueError):
            unpack_response(envelope)
