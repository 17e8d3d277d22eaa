"""Process functions: a command under hotset's memory management, in OpenFaaS's watchdog contract.

Its settings are environment variables, as the watchdog's are: ``fprocess`` is the command, ``mode`` says how it is
called:

    http        a server: started when the model becomes hot, on a port hotset chose (``$PORT``, or that of
                ``upstream_url``), stopped when it is evicted; calls are passed on to it as they are
    anything else  a command for each call: the body is its standard input, what it prints is the answer, and the
                request is in ``Http_*`` variables

The second is what a command without ``$PORT`` and without ``upstream_url`` gets when it does not say.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from hotset.errors import FunctionError
from hotset.functions.encoding import StreamFormat, to_json
from hotset.functions.http_envelope import (
    REQUEST,
    RESPONSE,
    SECRETS_VARIABLE,
    RequestHead,
    ResponseHead,
    pack,
    unpack_request,
)
from hotset.functions.media import JSON, Body
from hotset.functions.runtime import Call, Outcome, Stream
from hotset.functions.signature import Signature

SECRETS_PATH = "/var/openfaas/secrets"
"""Where OpenFaaS functions look; in a command's arguments it stands for the function's own folder of secrets."""
INTERNAL = "x-openfaas-internal"
"""Header of an error that the platform made, not the function."""

_PROBE_S = 0.02
_GRACE_S = 1.5
"""Between SIGTERM and SIGKILL; less than the node gives this process itself."""
_PIECE_BYTES = 65536
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "content-length")
)
_VARIABLE = re.compile(r"[A-Za-z0-9_]+")


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says."""

    command: tuple[str, ...]
    serves: bool
    """It is an HTTP server; else it is run once for each call."""
    host: str
    port: int
    health_path: str
    """Must answer 2xx before the first call; empty: it is enough that the port is open."""
    timeout_s: float | None
    content_type: str

    @classmethod
    def read(cls, env: Mapping[str, str]) -> ProcessSettings:
        """Raises ``FunctionError`` that names the variable."""
        text = env.get("fprocess") or env.get("function_process") or ""
        upstream = env.get("http_upstream_url") or env.get("upstream_url") or ""
        wants_port = "$PORT" in text or "${PORT}" in text
        serves = env.get("mode", "http" if upstream or wants_port else "streaming") == "http"
        address = urlsplit(upstream or "http://127.0.0.1")
        try:
            port = address.port or _free_port()
            words = shlex.split(text)
        except ValueError as error:
            raise FunctionError(f"fprocess or upstream_url cannot be read: {error}") from None
        if not words:
            raise FunctionError("fprocess is empty: give the command that serves the function")
        secrets = env.get(SECRETS_VARIABLE, SECRETS_PATH)
        words = [word.replace("${PORT}", str(port)).replace("$PORT", str(port)) for word in words]
        return cls(
            command=tuple(re.sub(rf"{SECRETS_PATH}(?=/|$)", lambda _: secrets, word) for word in words),
            serves=serves,
            host=address.hostname or "127.0.0.1",
            port=port,
            health_path=env.get("ready_path") or env.get("health_path") or "",
            timeout_s=_seconds(env.get("exec_timeout", "")),
            content_type=env.get("content_type", ""),
        )


class ProcessRuntime:
    """What a GPU process holds of a process function: as ``Runtime``, but for the envelopes its calls come in."""

    instance = None

    def __init__(self, name: str, code_path: str, device: str, env: Mapping[str, str] = os.environ) -> None:
        """Raises ``FunctionError`` when the command cannot be read or found."""
        self.signature = Signature(name=name, parameters=(), returns=Any)
        self.device = device
        self.settings = ProcessSettings.read(env)
        here = str(Path(sys.executable).parent)
        self._env = {**env, "PATH": f"{here}:{env.get('PATH', os.defpath)}", "PORT": str(self.settings.port)}
        self._cwd = code_path
        self._server: subprocess.Popen[bytes] | None = None
        program = self.settings.command[0]
        found = shutil.which(program, path=self._env["PATH"]) or shutil.which(str(Path(code_path) / program))
        if found is None:
            raise FunctionError(f"the command {program!r} is neither in the image nor on this machine's PATH")
        self._command = [found, *self.settings.command[1:]]

    def load(self) -> None:
        """Start the server and wait until it can be called; a command for each call needs nothing."""
        if not self.settings.serves:
            return
        # In this process's own group: the node ends the group, whatever becomes of this process.
        self._server = subprocess.Popen(self._command, env=self._env, cwd=self._cwd, stdin=subprocess.DEVNULL)
        while not self._answers():
            code = self._server.poll()
            if code is not None:
                raise FunctionError(f"{self._command[0]} ended with code {code} before it could be called: see its log")
            time.sleep(_PROBE_S)

    def unload(self) -> None:
        """Stop the server: SIGTERM, a grace period, SIGKILL."""
        server, self._server = self._server, None
        if server is None:
            return
        server.terminate()
        try:
            server.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

    def call(self, body: Body, content_type: str = JSON, accept: str = "*/*") -> Outcome:
        """Answer one request. ``SystemExit`` when the server is gone: so is the model."""
        if content_type != REQUEST:
            # Through another protocol's door: one that only wants the model loaded has what it wants.
            text = {} if not body else {"error": f"{self.signature.name} speaks HTTP only: call it under /function/"}
            return Outcome(status=400 if body else 200, body=to_json(text))
        head, payload = unpack_request(body)
        limit_s = self.settings.timeout_s
        try:
            limit_s = self._limit_s(head)
            if self.settings.serves:
                return self._forward(head, payload, limit_s)
            return self._execute(head, payload, limit_s)
        except TimeoutError:
            return _refused(
                504, f"the function took longer than the {limit_s:g} s of its exec_timeout, or of X-Timeout"
            )
        except ValueError as error:
            return _refused(400, f"the request cannot be passed on: {error}")
        except (OSError, http.client.HTTPException) as error:
            if self._server is not None and _ended(self._server):
                sys.stderr.write(f"{self.signature.name}: the server ended with code {self._server.returncode}\n")
                raise SystemExit(1) from None
            return _refused(502, f"the function's server broke off: {type(error).__name__}")

    def call_batch(self, calls: Sequence[Call]) -> list[Outcome]:
        return [self.call(call.body, call.content_type, call.accept) for call in calls]

    def _limit_s(self, head: RequestHead) -> float | None:
        """``exec_timeout``, or less where the caller's ``X-Timeout`` says so; raises ``ValueError`` for nonsense."""
        given = next((value for name, value in head.headers if name == "x-timeout"), "")
        try:
            asked_s = _seconds(given)
        except FunctionError:
            raise ValueError(f"X-Timeout is {given[:40]!r}: write a duration such as 30s") from None
        limits = [each for each in (asked_s, self.settings.timeout_s) if each is not None]
        return min(limits, default=None)

    # A server

    def _answers(self) -> bool:
        settings = self.settings
        try:
            if not settings.health_path:
                socket.create_connection((settings.host, settings.port), 1.0).close()
                return True
            connection = http.client.HTTPConnection(settings.host, settings.port, timeout=1.0)
            with contextlib.closing(connection):
                connection.request("GET", settings.health_path)
                return 200 <= connection.getresponse().status < 300
        except (OSError, http.client.HTTPException):
            return False

    def _forward(self, head: RequestHead, payload: memoryview, limit_s: float | None) -> Outcome:
        """Pass a call on, over a connection of its own: a kept one may be closed by the server just now."""
        settings = self.settings
        connection = http.client.HTTPConnection(settings.host, settings.port, timeout=limit_s)
        try:
            target = f"{head.path}?{head.query}" if head.query else head.path
            connection.putrequest(head.method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in head.headers:
                if name not in _HOP_BY_HOP:
                    connection.putheader(name, value.encode("latin-1", "replace"))
            connection.putheader("content-length", str(len(payload)))
            connection.endheaders(bytes(payload) if payload else None)
            response = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP]
        envelope = pack(ResponseHead(headers))
        length = response.getheader("content-length")
        if length is None and head.method != "HEAD":
            stream = Stream(envelope, _pieces(connection, response), _AS_IT_IS, self.signature.name)
            return Outcome(status=response.status, content_type=RESPONSE, stream=stream)
        with contextlib.closing(connection):
            return Outcome(status=response.status, content_type=RESPONSE, body=envelope + response.read())

    # A command for each call

    def _execute(self, head: RequestHead, payload: memoryview, limit_s: float | None) -> Outcome:
        _say("Forking fprocess.")
        begin_s = time.perf_counter()
        process = subprocess.Popen(
            self._command,
            env={**self._env, **_request_variables(head, len(payload))},
            cwd=self._cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            output, _ = process.communicate(bytes(payload), limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise TimeoutError from None
        took_s = time.perf_counter() - begin_s
        if process.returncode:
            _say(f"The command ended with code {process.returncode}. Duration: {took_s:.4f} seconds")
            return _refused(500, f"the function's command ended with code {process.returncode}: see its log", output)
        _say(f"Wrote {len(output)} Bytes - Duration: {took_s:.4f} seconds")
        sent = next((value for name, value in head.headers if name == "content-type"), "")
        headers = [("content-type", self.settings.content_type or sent or "text/plain")]
        return Outcome(content_type=RESPONSE, body=pack(ResponseHead(headers), output))


def _as_it_is(piece: Any) -> bytes:
    assert isinstance(piece, bytes)
    return piece


_AS_IT_IS = StreamFormat(content_type=RESPONSE, item=_as_it_is, error=lambda _: b"")


def _pieces(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[bytes]:
    with contextlib.closing(connection):
        while piece := response.read1(_PIECE_BYTES):
            yield piece


def _refused(status: int, message: str, output: bytes = b"") -> Outcome:
    """An error of the platform's own; what the command printed stays in the log."""
    if output:
        _say(output[:2000].decode("utf-8", "replace"))
    headers = [("content-type", JSON), (INTERNAL, "hotset")]
    return Outcome(status=status, content_type=RESPONSE, body=pack(ResponseHead(headers), to_json({"error": message})))


def _request_variables(head: RequestHead, length: int) -> dict[str, str]:
    """The request as the classic watchdog tells it to a command."""
    variables = {
        "Http_Method": head.method,
        "Http_Path": head.path,
        "Http_Query": head.query,
        "Http_ContentLength": str(length),
    }
    for name, value in head.headers:
        variable = name.replace("-", " ").title().replace(" ", "_")
        if _VARIABLE.fullmatch(variable) and "\0" not in value:
            variables[f"Http_{variable}"] = value
    return {name: value for name, value in variables.items() if "\0" not in value}


def _ended(server: subprocess.Popen[bytes]) -> bool:
    """Whether it is gone; one whose connection just broke gets a moment to be."""
    try:
        server.wait(0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


def _seconds(text: str) -> float | None:
    """``exec_timeout``: a number of seconds or a Go duration; empty or 0: no limit but the function's own."""
    if not text:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|)", text)
    if found is None:
        raise FunctionError(f"exec_timeout is {text!r}: write a duration such as 30s")
    return float(found[1]) * {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}[found[2]] or None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _say(line: str) -> None:
    """To the function's log, with the time in front as the watchdog writes it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{time.strftime('%Y/%m/%d %H:%M:%S')} {line}\n")
        sys.stderr.flush()
