"""The command line's side of a running server: one object for its HTTP API."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import quote

import httpx
import msgspec

from hotset.cli import credentials
from hotset.cli.credentials import Login
from hotset.cli.options import DEFAULT_GATEWAY
from hotset.errors import ConfigurationError, HotsetError

NDJSON = "application/x-ndjson"
COPY_BYTES = 1 << 20


class ServerError(HotsetError):
    """What the server answered instead of doing what was asked."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _AdminOnly(httpx.Auth):
    """Shows the credentials where they are asked for; what a call carries is for the function to see."""

    def __init__(self, login: Login) -> None:
        self._basic = httpx.BasicAuth(login.user, login.password)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if request.url.path.startswith(("/system/", "/v2/repository/")):
            yield from self._basic.auth_flow(request)
        else:
            yield request


class Remote:
    """A server's API. Every method raises ``HotsetError`` with one sentence when it cannot do what it says."""

    def __init__(self, gateway: str, timeout_s: float = 600.0, login: Login | None = None) -> None:
        """``login``: instead of what ``hotset login`` has kept for this server."""
        if not gateway.startswith(("http://", "https://")):
            raise ConfigurationError(f"--gateway {gateway!r} is no URL: write one such as {DEFAULT_GATEWAY}")
        self.url = gateway.rstrip("/")
        known = login or credentials.find(gateway)
        auth = None if known is None else _AdminOnly(known)
        self._http = httpx.Client(base_url=self.url, timeout=httpx.Timeout(timeout_s, connect=10.0), auth=auth)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int) -> Any:
        """A JSON answer."""
        with self._connected():
            return self._checked(self._http.get(path, params=query)).json()

    def change(self, method: str, path: str, body: Any = None) -> Any:
        """Send a JSON body; returns the JSON answer, None when it is empty."""
        with self._connected():
            response = self._checked(self._http.request(method, path, json=body))
        return response.json() if response.content else None

    def function(self, name: str) -> Any:
        """One function's status."""
        return self.get(f"/system/function/{quote(name, safe='')}")

    def lines(self, path: str, **query: str | int) -> Iterator[Any]:
        """An NDJSON answer, line by line, as it comes; a followed one has no time limit."""
        return map(json.loads, self.raw_lines(path, **query))

    def raw_lines(self, path: str, **query: str | int) -> Iterator[bytes]:
        """The lines of an NDJSON answer as they are."""
        timeout = httpx.Timeout(None, connect=10.0)
        with self._connected(), self._http.stream("GET", path, params=query, timeout=timeout) as response:
            if response.is_error:
                response.read()
            self._checked(response)
            for line in response.iter_lines():
                if line:
                    yield line.encode()

    def has_bundle(self, digest: str) -> bool:
        with self._connected():
            return self._http.get(f"/system/bundles/{digest}").status_code == 200

    def upload(self, digest: str, archive: IO[bytes], sent: Callable[[int], None]) -> None:
        """Send a bundle's archive; ``sent`` hears of each piece's bytes."""

        def pieces() -> Iterator[bytes]:
            while piece := archive.read(COPY_BYTES):
                yield piece
                sent(len(piece))

        with self._connected():
            self._checked(self._http.put(f"/system/bundles/{digest}", content=pieces()))

    def deploy(self, deployment: dict[str, Any], progress: Callable[[str], None]) -> Any:
        """Deploy and wait; ``progress`` gets what the server says meanwhile. Returns the function's status."""
        timeout = httpx.Timeout(None, connect=10.0)
        with (
            self._connected(),
            self._http.stream(
                "POST", "/system/functions", json=deployment, headers={"accept": NDJSON}, timeout=timeout
            ) as response,
        ):
            if response.is_error:
                response.read()
            self._checked(response)
            for line in response.iter_lines():
                news = json.loads(line) if line else {}
                if "progress" in news:
                    progress(news["progress"])
                elif "error" in news:
                    raise ServerError(news.get("status", 400), news["error"])
                elif "deployed" in news:
                    return news["deployed"]
        raise ServerError(502, "the server closed the connection before the deployment ended: see its log")

    def remove(self, name: str) -> None:
        with self._connected():
            self._checked(self._http.request("DELETE", "/system/functions", json={"functionName": name}))

    def invoke(self, name: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        """Call a function; whatever it answers is returned, errors too."""
        with self._connected():
            return self._http.post(f"/function/{quote(name, safe='.')}", content=body, headers={**api_key(), **headers})

    @contextlib.contextmanager
    def stream(self, name: str, body: bytes, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Call a function and read the answer as it comes."""
        url = f"/function/{quote(name, safe='.')}"
        with (
            self._connected(),
            self._http.stream("POST", url, content=body, headers={**api_key(), **headers}) as response,
        ):
            yield response

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise ConfigurationError(
                f"no server answers at {self.url}: start one with `hotset serve`, or name another with --gateway"
            ) from None
        except httpx.TimeoutException:
            raise ServerError(504, f"{self.url} did not answer in time: see the server's log") from None
        except httpx.TransportError as error:
            raise ServerError(502, f"the connection to {self.url} broke off ({error}): see the server's log") from None

    @staticmethod
    def _checked(response: httpx.Response) -> httpx.Response:
        if response.is_error:
            raise ServerError(response.status_code, error_text(response))
        return response


def api_key() -> dict[str, str]:
    """The header that shows ``HOTSET_API_KEY``, for functions that are called with a key."""
    key = os.environ.get("HOTSET_API_KEY")
    return {"x-api-key": key} if key else {}


def error_text(response: httpx.Response) -> str:
    """The sentence in a server's error answer."""
    with contextlib.suppress(msgspec.DecodeError):
        body = msgspec.json.decode(response.content)
        if isinstance(body, dict) and isinstance(body.get("error"), str):
            return str(body["error"])
    if response.status_code == 401:
        return "the server asks who you are: run `hotset login`"
    return f"HTTP {response.status_code}: {response.text[:500]}"
