"""Who may do what: one user for everything under ``/system``, and keys for the calls of single functions.

Basic authentication as OpenFaaS has it; functions may be called by anybody unless they have keys. Comparisons take the
same time whatever they compare, and neither passwords nor keys are kept: their digests are.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from hotset.errors import ConfigurationError
from hotset.gateway.app import Application, Headers, Scope, Send
from hotset.gateway.callers import shown_key
from hotset.gateway.calls import Receive
from hotset.gateway.openfaas.naming import key_of
from hotset.gateway.statuses import error_body
from hotset.store.datastore import ApiKeyRecord

PROTECTED = ("/system", "/ui", "/v2/repository", "/v2/systemsharedmemory", "/v2/cudasharedmemory")
"""First parts of the paths that change or show what the server does."""
CALLS = ("/function/", "/async-function/", "/v2/models/")
"""First parts of the paths that call a function, whose name comes next."""
USER_FILE, PASSWORD_FILE = "basic-auth-user", "basic-auth-password"
_REFUSED = b"invalid credentials"
_READING = frozenset(("GET", "HEAD", "OPTIONS"))


class Credentials:
    """One user and password."""

    def __init__(self, user: str, password: str) -> None:
        """Raises ``ConfigurationError`` when they cannot be used."""
        if not user or not password or ":" in user:
            raise ConfigurationError("the credentials need a user name without a colon, and a password")
        self._digest = _digest(f"{user}:{password}".encode())

    def match(self, authorization: bytes) -> bool:
        """Whether an Authorization header shows them."""
        scheme, _, encoded = authorization.partition(b" ")
        try:
            shown = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            shown = b""
        return hmac.compare_digest(_digest(shown), self._digest) and scheme.lower() == b"basic"


def read_credentials(auth: str | None, env: Mapping[str, str]) -> Credentials | None:
    """From ``--auth`` (a file of one line ``user:password``, or that text), else as OpenFaaS is configured:
    ``basic_auth=true``, and ``basic-auth-user`` and ``basic-auth-password`` under ``secret_mount_path``.

    None: nothing is configured. Raises ``ConfigurationError`` when it is, but cannot be read.
    """
    if auth:
        return _parse(auth)
    if env.get("basic_auth", "").lower() not in ("1", "true"):
        return None
    folder = Path(env.get("secret_mount_path", "/run/secrets"))
    return Credentials(_read(folder / USER_FILE), _read(folder / PASSWORD_FILE))


def _parse(auth: str) -> Credentials:
    path = Path(auth)
    is_file = len(auth) < 4096 and path.is_file()
    text = _read(path) if is_file else auth
    user, colon, password = text.partition(":")
    if not colon:
        raise ConfigurationError("--auth takes a file that holds user:password, or HOTSET_AUTH=user:password")
    return Credentials(user, password)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the credentials in {path} cannot be read: {error}") from None


class ApiKeys:
    """Which functions are called with a key only, and with which."""

    def __init__(self, records: Iterable[ApiKeyRecord] = ()) -> None:
        self._digests: defaultdict[str, set[str]] = defaultdict(set)
        self._records: dict[str, ApiKeyRecord] = {}
        """By digest."""
        for record in records:
            self.add(record)

    def add(self, record: ApiKeyRecord) -> None:
        self._digests[record.function].add(record.digest)
        self._records[record.digest] = record

    def remove(self, record: ApiKeyRecord) -> None:
        self._digests[record.function].discard(record.digest)
        self._records.pop(record.digest, None)
        if not self._digests[record.function]:
            del self._digests[record.function]

    def allow(self, function: str, shown: bytes) -> bool:
        """Whether a call that shows this key may go to the function; all may where there are no keys."""
        known = self._digests.get(function)
        if known is None:
            return True
        digest = key_digest(shown)
        # All of them, so that the time says nothing about which.
        return sum(hmac.compare_digest(digest, each) for each in known) > 0

    def record(self, shown: bytes) -> ApiKeyRecord | None:
        """What is known of a key."""
        return self._records.get(key_digest(shown)) if shown else None

    def __bool__(self) -> bool:
        return bool(self._digests)


def key_digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class Guard:
    """ASGI: asks for credentials where they are needed, and passes everything else on."""

    def __init__(self, application: Application, credentials: Credentials | None, keys: ApiKeys) -> None:
        self._application = application
        self._credentials = credentials
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        status, refusal = 401, self._refusal(scope["path"], scope["headers"])
        if refusal is None and _is_foreign(scope):
            body = error_body("another site's page asked for this: a browser may change things here from /ui/ only")
            status, refusal = 403, (body, [(b"content-type", b"application/json")])
        if refusal is None:
            await self._application(scope, receive, send)
            return
        body, headers = refusal
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def admits(self, path: str, headers: Headers) -> bool:
        """Whether a request for this path that shows these headers may be made; for doors beside this one."""
        return self._refusal(path, headers) is None

    def _refusal(self, path: str, headers: Headers) -> tuple[bytes, Headers] | None:
        if self._credentials is not None and path.startswith(PROTECTED) and _under(path, PROTECTED):
            if self._credentials.match(_header(headers, b"authorization")):
                return None
            challenge = (b"www-authenticate", b'Basic realm="Restricted"')
            return _REFUSED, [challenge, (b"content-type", b"text/plain; charset=utf-8")]
        if self._keys and path.startswith(CALLS):
            function = key_of(path.split("/", 4)[3 if path.startswith("/v2") else 2])
            if not self._keys.allow(function, shown_key(dict(headers))):
                body = error_body(f"{function} is called with a key: send Authorization: Bearer KEY")
                return body, [(b"www-authenticate", b"Bearer"), (b"content-type", b"application/json")]
        return None


def _is_foreign(scope: Scope) -> bool:
    """Whether a browser sends this, to change something, for another site's page: it would show our user's credentials,
    and needs none where there are none. What is no browser says nothing of the kind."""
    if scope["method"] in _READING or not _under(scope["path"], PROTECTED):
        return False
    headers = scope["headers"]
    site, origin = _header(headers, b"sec-fetch-site"), _header(headers, b"origin")
    if site:
        return site not in (b"same-origin", b"none")
    ours = (_header(headers, b"host"), _header(headers, b"x-forwarded-host"))
    return bool(origin) and origin.partition(b"://")[2] not in filter(None, ours)


def _under(path: str, parts: Iterable[str]) -> bool:
    return any(path == part or path.startswith(f"{part}/") for part in parts)


def _header(headers: Headers, name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
