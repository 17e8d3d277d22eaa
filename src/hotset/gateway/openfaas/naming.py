"""Which function a name means.

Inside hotset a function has one key: ``NAME`` in the default namespace, ``NAME.NAMESPACE`` in any other. Clients write
``NAME`` or ``NAME.openfaas-fn`` for the first, and give the namespace in a query, in a body, or after the last dot.
"""

from __future__ import annotations

import re

import msgspec

from hotset.errors import ConfigurationError

DEFAULT_NAMESPACE = "openfaas-fn"
"""The name OpenFaaS clients take for granted."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SECRET = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class Name(msgspec.Struct, frozen=True):
    """A function's name and namespace, as clients see them."""

    name: str
    namespace: str

    @property
    def key(self) -> str:
        return self.name if self.namespace == DEFAULT_NAMESPACE else f"{self.name}.{self.namespace}"

    @property
    def full(self) -> str:
        """``NAME.NAMESPACE``: how metrics name it, in the default namespace too."""
        return f"{self.name}.{self.namespace}"


def name_of(key: str) -> Name:
    """The name behind a key."""
    name, _, namespace = key.partition(".")
    return Name(name, namespace or DEFAULT_NAMESPACE)


def read_name(text: str, namespace: str | None = None) -> Name:
    """What a client wrote: ``NAME`` or ``NAME.NAMESPACE``, split at the last dot; ``namespace``: given apart."""
    if namespace:
        return Name(text.removesuffix(f".{namespace}"), namespace)
    name, dot, last = text.rpartition(".")
    return Name(name, last) if dot else Name(text, DEFAULT_NAMESPACE)


def key_of(text: str) -> str:
    """The key of what stands after ``/function/``."""
    return text.removesuffix(f".{DEFAULT_NAMESPACE}")


def check_function_name(name: str) -> str:
    """``name``; raises ``ConfigurationError`` when it is no DNS label."""
    if not _LABEL.fullmatch(name):
        raise ConfigurationError(f"service: {name[:80]!r} is no function name: use up to 63 of a-z, 0-9 and dashes")
    return name


def check_secret_name(name: str) -> str:
    """``name``; raises ``ConfigurationError`` when it is no DNS name, or could leave a folder."""
    if not _SECRET.fullmatch(name) or ".." in name:
        raise ConfigurationError(f"name: {name[:80]!r} is no secret name: use a-z, 0-9, dots and dashes")
    return name


def check_namespace_name(name: str) -> str:
    """``name``; raises ``ConfigurationError`` when it is no DNS label."""
    if not _LABEL.fullmatch(name):
        raise ConfigurationError(f"name: {name[:80]!r} is no namespace name: use up to 63 of a-z, 0-9 and dashes")
    return name
