"""Where ``hotset login`` keeps what it was told: one file, readable by its user alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from hotset.errors import ConfigurationError


class Login(msgspec.Struct, frozen=True, kw_only=True):
    user: str
    password: str


def path() -> Path:
    """XDG base directories; ``HOTSET_CREDENTIALS`` names another file."""
    given = os.environ.get("HOTSET_CREDENTIALS")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hotset" / "credentials.json"


def find(gateway: str) -> Login | None:
    """What was saved for this server; None: nothing."""
    return _read().get(origin(gateway))


def save(gateway: str, login: Login) -> Path:
    """Keep it, in place of what was kept for this server; returns the file."""
    return _write({**_read(), origin(gateway): login})


def forget(gateway: str) -> bool:
    """False: nothing was saved for this server."""
    logins = _read()
    if logins.pop(origin(gateway), None) is None:
        return False
    _write(logins)
    return True


def origin(gateway: str) -> str:
    """The server that a URL is of, without a password that stands in it."""
    parts = urlsplit(gateway)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()


def _read() -> dict[str, Login]:
    file = path()
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Login])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error}): remove it and log in again") from None


def _write(logins: dict[str, Login]) -> Path:
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)  # 0600 by definition
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(logins)))
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return file
