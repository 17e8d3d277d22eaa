"""The commands that keep credentials, keys, secrets and images, against a server that asks who they are."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from kill_and_restart import serving

from hotset.cli import credentials, functions
from hotset.cli.main import main
from hotset.cli.stack import deployment, read_stack
from hotset.errors import ConfigurationError

EXAMPLES = Path(__file__).parents[2] / "examples"


class Shell:
    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, *words: str, stdin: bytes | str | None = None, **env: str) -> Result:
        return CliRunner().invoke(main, words, input=stdin, env={"HOTSET_GATEWAY": self.url, **env})

    def done(self, *words: str, stdin: bytes | str | None = None, **env: str) -> str:
        result = self(*words, stdin=stdin, **env)
        assert result.exit_code == 0, result.output
        return result.output


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("data"), HOTSET_AUTH="admin:open sesame") as (client, _):
        yield str(client.base_url)


@pytest.fixture
def shell(server, tmp_path, monkeypatch) -> Shell:
    monkeypatch.setenv("HOTSET_CREDENTIALS", str(tmp_path / "kept" / "credentials.json"))
    return Shell(server)


@pytest.fixture
def logged_in(shell) -> Shell:
    shell.done("login", "--password-stdin", stdin="open sesame\n")
    return shell


def test_login_is_tried_kept_for_this_user_alone_and_forgotten(shell, tmp_path):
    refused = shell("list")
    assert refused.exit_code == 1
    assert "hotset login" in refused.output
    wrong = shell("login", "--password", "wrong")
    assert (wrong.exit_code, "does not know" in wrong.output) == (2, True)
    assert shell("login", "--password-stdin", stdin="\n").exit_code == 2
    shell.done("login", stdin="open sesame\n")
    kept = tmp_path / "kept" / "credentials.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    shell.done("list")
    assert credentials.find(f"{shell.url}/") == credentials.Login(user="admin", password="open sesame")
    assert credentials.find("http://elsewhere.example.com") is None
    shell.done("logout")
    assert shell("logout").exit_code == 2
    with_password = shell.url.replace("//", "//admin:open%20sesame@")
    said = shell.done("login", "--password-stdin", "--gateway", with_password, "--json", stdin="open sesame\n")
    assert json.loads(said) == {"gateway": shell.url, "user": "admin", "kept_in": str(kept)}
    assert json.loads(shell.done("logout", "--gateway", with_password, "--json")) == {"logged_out": shell.url}
    asked = shell("login", "--json", stdin="open sesame\n")
    assert (json.loads(asked.stdout)["user"], "Password" in asked.stderr) == ("admin", True)
    shell.done("logout")
    assert shell("list").exit_code == 1
    kept.write_text("not JSON")
    assert "log in again" in shell("list").output


def test_the_credentials_are_for_the_server_and_not_for_functions(logged_in, tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "README").write_text("nothing")
    logged_in.done("push", str(tmp_path / "image"), "me/env")
    logged_in.done("deploy", "--image", "me/env", "--fprocess", "env")
    assert "Authorization" not in logged_in.done("invoke", "env", stdin="")
    key = logged_in.done("key", "create", "env", "--name", "app", "--json")
    assert logged_in("invoke", "env", stdin="").exit_code == 1
    assert "Http_Method=POST" in logged_in.done("invoke", "env", stdin="", HOTSET_API_KEY=json.loads(key)["key"])
    assert "app" in logged_in.done("key", "list")
    assert json.loads(logged_in.done("key", "list", "--json"))[0]["name"] == "app"
    assert "hs_" in logged_in.done("key", "create", "env")
    assert json.loads(logged_in.done("key", "remove", "app", "--json")) == {"removed": "app"}
    assert "app" not in logged_in.done("key", "list")
    logged_in.done("remove", "env")


def test_secrets(logged_in, tmp_path):
    value = tmp_path / "value"
    value.write_bytes(b"\x00binary\xff")
    logged_in.done("secret", "create", "token", "--from-file", str(value))
    assert logged_in("secret", "create", "token", stdin="again").exit_code == 1
    replaced = logged_in.done("secret", "create", "token", "--replace", "--json", stdin="again")
    assert json.loads(replaced) == {"kept": "token"}
    assert logged_in("secret", "create", "empty", stdin="").exit_code == 2
    assert "token" in logged_in.done("secret", "list")
    assert json.loads(logged_in.done("secret", "list", "--json")) == [{"name": "token", "namespace": "openfaas-fn"}]
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "README").write_text("nothing")
    pushed = json.loads(logged_in.done("push", str(tmp_path / "image"), "me/show", "--json"))
    image = f"me/show@sha256:{pushed['digest']}"
    command = "cat /var/openfaas/secrets/token"
    logged_in.done("deploy", "--image", image, "--fprocess", command, "--secret", "token", "--json")
    assert logged_in.done("invoke", "show", stdin="").strip() == "again"
    logged_in.done("remove", "show")
    assert json.loads(logged_in.done("secret", "remove", "token", "--json")) == {"removed": "token"}
    assert "hotset secret create" in logged_in.done("secret", "list")


def test_a_stack_file_is_pushed_and_deployed(logged_in):
    said = logged_in.done("deploy", "-f", str(EXAMPLES / "stack.yml"))
    assert "Deployed echo" in said
    assert "Deployed shout" in said
    assert logged_in.done("invoke", "echo", "--json", '"hello"').strip() == '"hello"'
    assert logged_in.done("invoke", "shout", "text=hello").strip() == '"HELLO!"'
    echo = json.loads(logged_in.done("describe", "echo", "--json"))
    assert echo["limits"] == {"memory": "128Mi", "nvidia.com/gpu": "1"}
    assert echo["envProcess"] == "python server.py"
    assert echo["hotset"]["kind"] == "gpu"
    only = json.loads(logged_in.done("deploy", "-f", str(EXAMPLES / "stack.yml"), "--name", "shout", "--json"))
    assert [each["name"] for each in only] == ["shout"]
    assert "it has: echo, shout" in logged_in("deploy", "-f", str(EXAMPLES / "stack.yml"), "--name", "none").output
    for name in ("echo", "shout"):
        logged_in.done("remove", name)


def test_asynchronous_calls_are_looked_after(logged_in):
    assert "ended well" in logged_in.done("async", "list")
    assert json.loads(logged_in.done("async", "list", "--state", "dead", "--json")) == []
    for verb in ("retry", "remove"):
        assert "no such call" in logged_in("async", verb, "absent").output
    call_id = httpx.post(f"{logged_in.url}/async-function/absent").headers["x-call-id"]
    for verb, done in (("retry", "retried"), ("remove", "removed")):
        _wait_until_given_up(logged_in, call_id)
        assert json.loads(logged_in.done("async", verb, call_id, "--json")) == {done: call_id}
    assert "ended well" in logged_in.done("async", "list")


def _wait_until_given_up(shell: Shell, call_id: str) -> None:
    deadline_s = time.monotonic() + 30
    while [each["call_id"] for each in json.loads(shell.done("async", "list", "--state", "dead", "--json"))] != [
        call_id
    ]:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_what_to_deploy_is_said_once(logged_in):
    for words in ((), ("--image", "a", "-f", str(EXAMPLES / "stack.yml"))):
        assert "one of them" in logged_in("deploy", *words).output


def test_a_stack_file_means_what_faas_cli_means_by_it(tmp_path):
    file = tmp_path / "stack.yml"
    (tmp_path / "more.yml").write_text("environment:\n  a: 1\n  b: true\n")
    file.write_text(
        """
functions:
  one:
    image: ${REGISTRY:-me}/one:${TAG}
    fprocess: env
    environment: {b: "own", c: 1.5}
    environment_file: [more.yml]
    labels: {com.openfaas.scale.zero: true}
    constraints: ["gpu=1"]
    limits: {memory: 1Gi, nvidia.com/gpu: 1}
    readonly_root_filesystem: true
"""
    )
    stack = read_stack(file, {"TAG": "2"})
    assert deployment("one", stack.functions["one"], tmp_path) == {
        "service": "one",
        "image": "me/one:2",
        "envProcess": "env",
        "envVars": {"a": "1", "b": "own", "c": "1.5"},
        "labels": {"com.openfaas.scale.zero": "true"},
        "constraints": ("gpu=1",),
        "limits": {"memory": "1Gi", "nvidia.com/gpu": "1"},
        "readOnlyRootFilesystem": True,
    }
    (tmp_path / "more.yml").write_text("[1]")
    with pytest.raises(ConfigurationError, match="environment_file"):
        deployment("one", stack.functions["one"], tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"), [("a: [", "no YAML"), ("functions: 1", "no stack file"), ("", "no stack file"), (None, "read")]
)
def test_a_stack_file_that_makes_no_sense_is_refused(tmp_path, text, problem):
    file = tmp_path / "stack.yml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=problem):
        read_stack(file)


def test_followed_logs_are_asked_for_again_when_the_server_has_served_them_long_enough(monkeypatch):
    monkeypatch.setattr(functions, "ASK_AGAIN_S", 0.0)
    lines = [{"timestamp": f"2030-01-31T12:00:0{second}+00:00", "text": text} for second, text in enumerate("abcd")]
    answers, asked = iter([lines[:1], lines[:1], lines[:3], lines[2:]]), []

    class Server:
        def lines(self, path, **query):
            asked.append(query)
            return next(answers)

    seen = list(islice(functions._followed(Server(), {"name": "cat", "tail": 1}), 4))
    assert [line["text"] for line in seen] == ["a", "b", "c", "d"]
    assert asked[0] == {"name": "cat", "tail": 1}
    assert asked[-1] == {"name": "cat", "tail": -1, "since": lines[2]["timestamp"]}
