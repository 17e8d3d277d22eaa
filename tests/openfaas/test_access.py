"""Who may do what, and where callbacks may go."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from hotset.errors import ConfigurationError
from hotset.gateway.auth import ApiKeys, Credentials, key_digest, read_credentials
from hotset.gateway.openfaas.callbacks import CallbackPolicy, Callbacks
from hotset.gateway.openfaas.service import AccessConfig
from hotset.store.datastore import ApiKeyRecord


def test_credentials_are_read_as_openfaas_has_them(tmp_path):
    (tmp_path / "basic-auth-user").write_text("admin\n")
    (tmp_path / "basic-auth-password").write_text("open sesame\n")
    env = {"basic_auth": "true", "secret_mount_path": str(tmp_path)}
    credentials = read_credentials(None, env)
    assert credentials.match(httpx.BasicAuth("admin", "open sesame")._auth_header.encode())
    assert not credentials.match(httpx.BasicAuth("admin", "open sesame ")._auth_header.encode())
    assert read_credentials(None, {"secret_mount_path": str(tmp_path)}) is None
    assert read_credentials(None, {"basic_auth": "false"}) is None
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_credentials(None, {"basic_auth": "1", "secret_mount_path": str(tmp_path / "absent")})


def test_credentials_are_read_from_a_file_or_a_variable(tmp_path):
    file = tmp_path / "auth"
    file.write_text("me:pass:word\n")
    shown = httpx.BasicAuth("me", "pass:word")._auth_header.encode()
    assert read_credentials(str(file), {}).match(shown)
    assert read_credentials("me:pass:word", {"basic_auth": "true"}).match(shown)
    for nonsense in ("no-colon", ":password", "user:"):
        with pytest.raises(ConfigurationError):
            read_credentials(nonsense, {})


def test_passwords_do_not_show_in_what_is_printed():
    assert "secret" not in repr(Credentials("admin", "secret"))
    assert "secret" not in repr(vars(Credentials("admin", "secret")))


@pytest.mark.parametrize(
    ("address", "config", "problem"),
    [
        ("127.0.0.1", AccessConfig(), None),
        ("::1", AccessConfig(), None),
        ("0.0.0.0", AccessConfig(), "--auth FILE, or --insecure"),
        ("10.0.0.7", AccessConfig(), "--auth FILE, or --insecure"),
        ("fe80::1%eth0", AccessConfig(), "--auth FILE, or --insecure"),
        ("0.0.0.0", AccessConfig(insecure=True), None),
        ("0.0.0.0", AccessConfig(credentials=Credentials("a", "b")), None),
    ],
)
def test_what_others_can_reach_asks_who_they_are(address, config, problem):
    if problem is None:
        config.check_address(address)
    else:
        with pytest.raises(ConfigurationError, match=problem):
            config.check_address(address)


def test_keys():
    record = ApiKeyRecord(name="app", function="cat", digest=key_digest(b"key"), created_at_s=0.0)
    keys = ApiKeys([record])
    assert keys.allow("dog", b"")
    assert keys.allow("cat", b"key")
    assert not keys.allow("cat", b"kay")
    keys.remove(record)
    assert not keys
    assert keys.allow("cat", b"")


def checked(url: str, *allowed: str) -> None:
    asyncio.run(CallbackPolicy(allowed).check(url))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost:8080/",
        "http://127.1/",
        "http://2130706433/",
        "http://[::1]/",
        "http://0.0.0.0/",
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[2002:7f00:1::]/",
        "http://[64:ff9b::127.0.0.1]/",
        "http://[fd00:ec2::254]/",
        "http://100.100.100.200/",
        "http://224.0.0.1/",
    ],
)
def test_a_callback_does_not_reach_what_its_caller_may_not(url):
    with pytest.raises(ConfigurationError, match="--allow-callbacks"):
        checked(url)
    checked(url, "*")


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://8.8.8.8/", ()),
        ("http://10.1.2.3/", ()),
        ("http://192.168.0.1/", ()),
        ("http://[fc00::1]/", ()),
        ("https://[2001:4860:4860::8888]:8443/x?y=z", ()),
        ("http://10.1.2.3/", ("10.1.0.0/16",)),
        ("http://127.0.0.1:5000/", ("127.0.0.1",)),
        ("http://localhost/", ("localhost",)),
        ("http://localhost/", ("127.0.0.0/8", "::1/128")),
    ],
)
def test_anything_but_this_machine_may_be_called_and_what_is_allowed(url, allowed):
    checked(url, *allowed)


@pytest.mark.parametrize("url", ["http://8.8.8.8/", "http://10.2.0.1/", "http://127.0.0.1/", "http://[::1]/"])
def test_once_some_are_allowed_no_others_are(url):
    with pytest.raises(ConfigurationError, match="--allow-callbacks"):
        checked(url, "app.example.com", "10.1.0.0/16")


def test_all_hosts_below_a_name_can_be_allowed(monkeypatch):
    async def private(*_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80))]

    async def story():
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", private)
        policy = CallbackPolicy([".example.com"])
        await policy.check("http://app.example.com/")
        for url in ("http://example.com.evil.org/", "http://notexample.com/"):
            with pytest.raises(ConfigurationError):
                await policy.check(url)

    asyncio.run(story())


def test_an_entry_that_is_neither_host_nor_network_is_refused():
    for entry in ("10.0.0.0/99", "a/b", " "):
        with pytest.raises(ConfigurationError, match="neither a host nor a network"):
            CallbackPolicy([entry])


def test_the_connection_goes_to_the_number_that_was_checked(monkeypatch):
    seen: list[httpx.Request] = []

    def take(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(302, headers={"location": "http://169.254.169.254/"})

    async def changing(self, parts):
        return "203.0.113.9"

    async def story():
        monkeypatch.setattr(CallbackPolicy, "address", changing)
        callbacks = Callbacks(CallbackPolicy(), httpx.MockTransport(take))
        assert await callbacks.send("https://user:pass@app.example.com:8443/x", [("x-a", "b")], b"body") is None
        await callbacks.close()

    asyncio.run(story())
    (request,) = seen  # a redirect is not followed
    assert request.url.host == "203.0.113.9"
    assert request.headers["host"] == "app.example.com:8443"
    assert request.extensions["sni_hostname"] == "app.example.com"


def test_a_callback_that_cannot_be_delivered_says_why():
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    async def story():
        callbacks = Callbacks(CallbackPolicy(["127.0.0.1"]), httpx.MockTransport(broken))
        assert "refused" in await callbacks.send("http://127.0.0.1/", [], b"")
        assert "may not be called back" in await callbacks.send("http://10.0.0.1/", [], b"")
        await callbacks.close()

    asyncio.run(story())
