"""Where the answer of an asynchronous call may be sent, and the sending.

A caller names the address, and the server sits where the caller may not be: so the address is resolved here, every
one of its numbers is checked, and the connection goes to the number that was checked, whatever the name says later.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

import httpx

from hotset.errors import ConfigurationError

TIMEOUT_S = 30.0
RESOLVE_S = 5.0
MAX_URL_CHARACTERS = 2_000

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


METADATA = frozenset(ipaddress.ip_address(number) for number in ("fd00:ec2::254", "100.100.100.200"))
"""Where clouds hand out a machine's credentials, beside the link-local 169.254.169.254."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class CallbackPolicy:
    """``allowed``: hosts (``app.example.com``; ``.example.com``: all below it), networks (``10.1.0.0/16``) or ``*``.

    None: anywhere but loopback and link-local addresses, which are the server's own and its cloud's.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        """Raises ``ConfigurationError`` for an entry that is neither."""
        self._anything = "*" in allowed
        self._default = not allowed
        self._hosts: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in allowed:
            try:
                self._networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if "/" in entry or not entry.strip():
                    raise ConfigurationError(
                        f"{entry!r} is neither a host nor a network such as 10.1.0.0/16, nor *"
                    ) from None
                self._hosts.add(entry.lower())

    async def check(self, url: str) -> SplitResult:
        """The parts of a callback address; raises ``ConfigurationError`` when it is none or must not be called.

        A name that cannot be resolved now may be later, and is let through: it is looked at again before each call.
        """
        parts = _split(url)
        with contextlib.suppress(OSError):
            await self.address(parts)
        return parts

    async def address(self, parts: SplitResult) -> str:
        """The number to connect to. Raises ``ConfigurationError`` if it must not be called, ``OSError`` if unknown."""
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        found = await asyncio.wait_for(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM), RESOLVE_S)
        numbers = [str(each[4][0]).partition("%")[0] for each in found]
        if not self._host_allowed(host):
            for number in numbers:
                if not self._number_allowed(ipaddress.ip_address(number)):
                    raise ConfigurationError(
                        f"X-Callback-Url: {host[:100]} may not be called back: allow it with --allow-callbacks"
                    )
        return numbers[0]

    def _host_allowed(self, host: str) -> bool:
        host = host.lower()
        return (
            self._anything or host in self._hosts or any(host.endswith(each) for each in self._hosts if each[0] == ".")
        )

    def _number_allowed(self, number: Address) -> bool:
        number = _plain(number)
        if not self._default:
            return any(number in network for network in self._networks)
        own = number.is_loopback or number.is_link_local or number.is_unspecified
        return not own and not number.is_multicast and number not in METADATA


def _plain(number: Address) -> Address:
    """The IPv4 number that an IPv6 one stands for, if it does."""
    if isinstance(number, ipaddress.IPv4Address):
        return number
    if number in _NAT64:
        return ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    return number.ipv4_mapped or number.sixtofour or number


class Callbacks:
    """Sends answers."""

    def __init__(self, policy: CallbackPolicy, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """``transport``: what carries the requests instead of the network."""
        self._policy = policy
        # Neither proxies from the environment nor redirects: both would go where nobody checked.
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, follow_redirects=False, transport=transport)

    async def send(self, url: str, headers: Sequence[tuple[str, str]], body: bytes) -> str | None:
        """POST an answer; returns why it did not arrive, None when it did (any status but a 5xx)."""
        try:
            parts = _split(url)
            number = await self._policy.address(parts)
            target = httpx.URL(url).copy_with(host=number)
            request = self._http.build_request(
                "POST",
                target,
                headers=[("host", parts.netloc.rpartition("@")[2]), *headers],
                content=body,
                extensions={"sni_hostname": parts.hostname},
            )
            response = await self._http.send(request)
        except (httpx.HTTPError, httpx.InvalidURL, ConfigurationError, OSError, ValueError) as error:
            return f"the callback was not delivered: {error or type(error).__name__}"
        if response.status_code >= 500:
            return f"the callback was answered {response.status_code}"
        return None

    async def close(self) -> None:
        await self._http.aclose()


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        sound = False
    if not sound or len(url) > MAX_URL_CHARACTERS:
        raise ConfigurationError("X-Callback-Url is no address: write http://HOST/PATH or https://HOST/PATH")
    return parts
