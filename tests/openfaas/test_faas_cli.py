"""The exact requests of faas-cli's verbs, of an OpenFaaS gateway in front, and of the provider conformance tests."""

from __future__ import annotations

import json
from datetime import datetime

import httpx
import pytest
from faas_world import ALPINE, ON_GPU, Faas, serving, until
from prometheus_client.parser import text_string_to_metric_families

from hotset.gateway.logbook import Logbook
from hotset.node.fake import FakeFunction

CLI = {"user-agent": "faas-cli/0.18.12", "content-type": "application/json"}


def body_of(name: str, **more: object) -> dict[str, object]:
    """What ``faas-cli deploy`` sends."""
    return {
        "service": name,
        "image": ALPINE,
        "namespace": "",
        "envProcess": "env",
        "labels": {},
        "annotations": {},
        "network": "",
        "registryAuth": "",
        **more,
    }


async def deploy(faas: Faas, name: str = "env", **more: object) -> None:
    """``faas-cli deploy``: PUT, and POST when that is a 404."""
    reply = await faas.send("PUT", "/system/functions", body_of(name, **more), **CLI)
    if reply.status_code == 404:
        reply = await faas.send("POST", "/system/functions", body_of(name, **more), **CLI)
    assert (reply.status_code, reply.content) == (202, b""), reply.text


def test_version_ready_login_list_and_describe(tmp_path):
    async def story(faas: Faas):
        assert (await faas.get("/system/info")).json()["provider"]["version"]["release"]
        assert (await faas.get("/healthz")).status_code == 200
        assert (await faas.http.head("/healthz")).status_code == 200
        login = await faas.http.get("/system/functions", auth=("admin", "anything"))
        assert (login.status_code, login.content) == (200, b"[]"), "the default list works, and is never null"
        await deploy(faas)
        status = (await faas.get("/system/function/env", usage="1")).json()
        assert status["availableReplicas"] == 1
        assert set(status["usage"]) == {"cpu", "totalMemoryBytes"}
        (listed,) = (await faas.get("/system/functions")).json()
        assert datetime.fromisoformat(listed["createdAt"]).tzinfo is not None
        assert (await faas.get("/system/function/absent", usage="1")).status_code == 404

    serving(story, tmp_path)


def test_what_is_deployed_reads_back_as_it_was_written(tmp_path):
    given = {
        "envVars": {"custom_env": "test value"},
        "constraints": ["node.platform.os == linux"],
        "secrets": ["key"],
        "labels": {"canary": "true", "com.openfaas.scale.min": "1"},
        "annotations": {"important": '{"a": "b",\n\t"c": 1}'},
        "limits": {"memory": "5Mi", "cpu": "100m"},
        "requests": {"memory": "5Mi"},
        "readOnlyRootFilesystem": True,
    }

    async def story(faas: Faas):
        await faas.send("POST", "/system/secrets", {"name": "key", "value": "v"})
        await deploy(faas, "full", **given)
        await deploy(faas, "plain", labels=None, annotations=None)
        listed = {each["name"]: each for each in (await faas.get("/system/functions")).json()}
        expected = {**given, "labels": given["labels"] | {"faas_function": "full"}}
        assert listed["full"].items() >= expected.items()
        assert listed["full"]["envProcess"] == "env"
        plain = listed["plain"]
        assert not {"limits", "requests", "secrets", "constraints", "envVars", "usage"} & set(plain)
        assert (plain["labels"], plain["annotations"]) == ({"faas_function": "plain"}, {})
        assert plain["image"] == ALPINE
        await deploy(faas, "full", labels={"canary": "false"})
        assert (await faas.status("full"))["labels"] == {"canary": "false", "faas_function": "full"}

    serving(story, tmp_path)


def test_deploy_replace_deletes_and_posts_at_once(tmp_path):
    async def story(faas: Faas):
        await deploy(faas)
        for _ in range(2):
            await faas.send("DELETE", "/system/functions", {"functionName": "env", "namespace": ""}, **CLI)
            assert (await faas.send("POST", "/system/functions", body_of("env"), **CLI)).status_code == 202
            assert (await faas.http.post("/function/env.openfaas-fn")).status_code == 200

    serving(story, tmp_path)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_invoke_passes_method_query_and_headers(tmp_path, method):
    async def story(faas: Faas):
        await deploy(faas, envVars={"custom_env": "test value"})
        reply = await faas.http.request(
            method, "/function/env.openfaas-fn?testing=1", headers={"x-token": "a", "content-type": "text/plain"}
        )
        lines = reply.text.splitlines()
        for line in (f"Http_Method={method}", "Http_Query=testing=1", "Http_X_Token=a", "custom_env=test value"):
            assert line in lines
        assert reply.headers["x-call-id"]
        assert int(reply.headers["x-start-time"]) > 1_600_000_000 * 10**9
        assert float(reply.headers["x-duration-seconds"]) >= 0
        assert f"Http_X_Call_Id={reply.headers['x-call-id']}" in lines
        own = await faas.http.request(method, "/function/env", headers={"x-call-id": "mine", "authorization": "Own x"})
        assert "Http_X_Call_Id=mine" in own.text.splitlines()
        assert "Http_Authorization=Own x" in own.text.splitlines(), "a client's own credentials are the function's"

    serving(story, tmp_path)


SERVER = """
import http.server, os

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", "/elsewhere?path=" + self.path)
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.end_headers()

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(3):
            self.wfile.write(b"data: %d\\n\\n" % number)
            self.wfile.flush()

http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


def test_a_functions_own_server_answers_with_redirects_and_streams(tmp_path):
    async def story(faas: Faas):
        await faas.push("me/server:1", {"serve.py": SERVER})
        await deploy(
            faas,
            "server",
            image="registry.example.com/me/server:1",
            envProcess="python serve.py",
            envVars={"mode": "http"},
        )
        reply = await faas.http.get("/function/server/a%20b?c=d")
        assert (reply.status_code, reply.headers["location"]) == (302, "/elsewhere?path=/a%20b?c=d")
        assert reply.headers.get_list("set-cookie") == ["a=1", "b=2"]
        stream = await faas.http.post("/function/server", headers={"accept": "text/event-stream"})
        assert stream.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
        assert stream.headers["content-type"] == "text/event-stream"
        assert "content-length" not in stream.headers

    serving(story, tmp_path)


def test_logs_have_the_watchdogs_lines(tmp_path):
    async def story(faas: Faas):
        await deploy(faas, "cat", envProcess="cat")
        await faas.http.post("/function/cat", content=b"hello")
        await until(lambda: len(faas.control.logbook.tail("cat")) == 2)
        reply = await faas.get("/system/logs", name="cat", follow="false", tail="-1")
        assert reply.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in reply.text.splitlines()]
        texts = [line["text"].lstrip("0123456789/: ") for line in lines]
        assert texts[0].startswith("Forking fprocess")
        assert texts[1].startswith("Wrote 5 Bytes")
        assert all(line["name"] == "cat" and line["namespace"] == "openfaas-fn" and line["instance"] for line in lines)
        assert datetime.fromisoformat(lines[0]["timestamp"]).tzinfo is not None
        last = (await faas.get("/system/logs", name="cat.openfaas-fn", follow="false", tail="1")).text.splitlines()
        assert [json.loads(line)["text"] for line in last] == [lines[1]["text"]]
        later = await faas.get("/system/logs", name="cat", follow="false", since="2100-01-01T00:00:00Z")
        assert later.text == ""
        assert (await faas.get("/system/logs", name="cat", instance="another")).text == ""
        for query, status in (
            ({"name": "absent"}, 404),
            ({"name": "cat", "tail": "x"}, 422),
            ({"name": "cat", "since": "x"}, 422),
        ):
            assert (await faas.get("/system/logs", **query)).status_code == status

    serving(story, tmp_path)


def test_followed_logs_end_by_themselves_with_all_that_was_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(Logbook.follow, "__kwdefaults__", {"for_s": 0.0})

    async def story(faas: Faas):
        await deploy(faas, "cat", envProcess="cat")
        await faas.http.post("/function/cat", content=b"hello")
        await until(lambda: len(faas.control.logbook.tail("cat")) == 2)
        query = {"follow": "true", "name": "cat", "tail": "-1"}
        reply = await faas.http.get("/system/logs", params=query, headers=CLI)
        assert (reply.status_code, len(reply.text.splitlines())) == (200, 2)

    serving(story, tmp_path)


def test_remove(tmp_path):
    async def story(faas: Faas):
        await deploy(faas)
        for body, status in (
            ({"functionName": ""}, 400),
            ({}, 400),
            ({"functionName": "env"}, 202),
            ({"functionName": "env"}, 404),
        ):
            assert (await faas.send("DELETE", "/system/functions", body, **CLI)).status_code == status

    serving(story, tmp_path)


def test_secrets_are_made_listed_used_changed_and_removed_but_never_shown(tmp_path):
    async def story(faas: Faas):
        path = "/system/secrets"
        made = {"name": "key", "namespace": "openfaas-fn", "value": "first", "rawValue": "Zmlyc3Q="}
        assert (await faas.send("POST", path, made)).status_code == 201
        assert (await faas.send("POST", path, made)).status_code == 409
        assert (await faas.get(path, namespace="openfaas-fn")).json() == [{"name": "key", "namespace": "openfaas-fn"}]
        binary = {"name": "binary", "value": "lossy", "rawValue": "AP8K"}
        assert (await faas.send("POST", path, binary)).status_code == 201
        await deploy(faas, "show", envProcess="cat /var/openfaas/secrets/key", secrets=["key"])
        await deploy(faas, "bytes", envProcess="cat /var/openfaas/secrets/binary", secrets=["binary"])
        assert (await faas.http.post("/function/show")).content == b"first"
        assert (await faas.http.post("/function/bytes")).content == b"\x00\xff\n"
        assert (await faas.send("PUT", path, {"name": "key", "value": "second"})).status_code == 202
        await deploy(faas, "show", envProcess="cat /var/openfaas/secrets/key", secrets=["key"], annotations={"a": "b"})
        assert (await faas.http.post("/function/show")).content == b"second"
        for method in ("PUT", "DELETE"):
            assert (await faas.send(method, path, {"name": "absent", "value": ""})).status_code == 404
        await faas.send("DELETE", "/system/functions", {"functionName": "show"})
        assert (await faas.send("DELETE", path, {"name": "key"})).status_code == 202
        assert (await faas.get(path)).json() == [{"name": "binary", "namespace": "openfaas-fn"}]
        unknown = await faas.deploy("late", secrets=["key"])
        assert (unknown.status_code, "no secret 'key'" in unknown.json()["error"]) == (400, True)
        for name in ("../up", "a/b", "", "UPPER", "a..b"):
            assert (await faas.send("POST", path, {"name": name, "value": "x"})).status_code == 400

    serving(story, tmp_path)


def test_namespaces(tmp_path):
    async def story(faas: Faas):
        assert (await faas.get("/system/namespaces")).json() == ["openfaas-fn"]
        marked = {"name": "dev", "labels": {"openfaas": "1"}, "annotations": {"openfaas": "1"}}
        assert (await faas.send("POST", "/system/namespace/", marked)).status_code == 201
        assert (await faas.send("POST", "/system/namespace/", marked)).status_code == 409
        assert (await faas.get("/system/namespaces")).json() == ["openfaas-fn", "dev"]
        assert (await faas.get("/system/namespace/dev")).json() == marked
        assert (
            await faas.send("PUT", "/system/namespace/dev", {"name": "dev", "labels": {"x": "y"}})
        ).status_code == 202
        assert (await faas.get("/system/namespace/dev")).json()["labels"] == {"x": "y"}
        await faas.send("POST", "/system/secrets", {"name": "key", "namespace": "dev", "value": "of dev"})
        assert (await faas.get("/system/secrets")).json() == []
        await deploy(faas, "show", namespace="dev", envProcess="cat /var/openfaas/secrets/key", secrets=["key"])
        assert (await faas.http.post("/function/show.dev")).text == "of dev"
        assert (await faas.get("/system/logs", name="show", namespace="dev", follow="false")).status_code == 200
        assert (await faas.send("DELETE", "/system/namespace/dev", {"name": "dev"})).status_code == 409
        await faas.send("DELETE", "/system/functions", {"functionName": "show", "namespace": "dev"})
        assert (await faas.send("DELETE", "/system/namespace/dev", {"name": "dev"})).status_code == 202
        assert (await faas.send("DELETE", "/system/namespace/dev", {"name": "dev"})).status_code == 404
        assert (await faas.get("/system/namespace/dev")).status_code == 404
        assert (await faas.get("/system/namespace/openfaas-fn")).json()["name"] == "openfaas-fn"
        for method in ("PUT", "DELETE"):
            assert (await faas.send(method, "/system/namespace/openfaas-fn", {})).status_code == 409
        assert (await faas.send("POST", "/system/namespace/", {"name": "No.Name"})).status_code == 400

    serving(story, tmp_path)


def test_what_survives_a_restart(tmp_path):
    async def first(faas: Faas):
        await faas.send("POST", "/system/namespace/", {"name": "dev"})
        await faas.send("POST", "/system/secrets", {"name": "key", "value": "kept"})
        await deploy(faas, "show", envProcess="cat /var/openfaas/secrets/key", secrets=["key"])

    async def second(faas: Faas):
        assert (await faas.get("/system/namespaces")).json() == ["openfaas-fn", "dev"]
        assert (await faas.http.post("/function/show")).text == "kept"
        assert (await faas.send("PUT", "/system/functions", body_of("show"))).status_code == 202
        assert [image["name"] for image in (await faas.get("/system/images")).json()] == [ALPINE]

    serving(first, tmp_path)
    serving(second, tmp_path)


def test_the_exporter_of_a_gateway_in_front(tmp_path):
    async def story(faas: Faas):
        await deploy(faas, labels={"com.openfaas.scale.min": "2"})
        assert (await faas.get("/system/namespaces")).json() == ["openfaas-fn"]
        (listed,) = (await faas.get("/system/functions", namespace="openfaas-fn")).json()
        assert (listed["replicas"], listed["availableReplicas"], listed["invocationCount"]) == (2, 2, 0)
        query = {"namespace": "openfaas-fn", "usage": "false"}
        assert "usage" not in (await faas.http.get("/system/function/env", params=query)).json()

    serving(story, tmp_path)


def test_image_names(tmp_path):
    async def story(faas: Faas):
        digest = await faas.push("me/tool")
        for image in (
            "me/tool",
            "me/tool:latest",
            "registry.example.com:5000/me/tool",
            f"me/tool@sha256:{digest}",
            f"sha256:{digest}",
        ):
            assert (await faas.deploy(image=image)).status_code == 202, image
            assert (await faas.status("env"))["image"] == image
        for image, says in (
            ("", "give the image"),
            ("me/other", "hotset push"),
            ("me/tool:2", "hotset push"),
            ("/etc", "--allow-local-images"),
            ("../../etc", "hotset push"),
            ("sha256:" + "0" * 64, "no bundle"),
        ):
            reply = await faas.deploy(image=image)
            assert (reply.status_code, says in reply.json()["error"]) == (400, True), reply.text
        assert (await faas.send("DELETE", "/system/images/me/tool")).status_code == 202
        assert (await faas.send("DELETE", "/system/images/me/tool")).status_code == 404
        assert (await faas.send("PUT", "/system/images/No Name", {"digest": digest})).status_code == 400
        assert (await faas.send("PUT", "/system/images/a", {"digest": "0" * 64})).status_code == 404

    serving(story, tmp_path)


def test_local_images_where_they_are_allowed(tmp_path):
    async def story(faas: Faas):
        folder = tmp_path / "tool"
        folder.mkdir()
        (folder / "words.txt").write_text("from a file")
        assert (await faas.deploy(image=str(folder), command="cat words.txt")).status_code == 202
        assert (await faas.http.post("/function/env")).text == "from a file"
        assert (await faas.deploy(image="/no/such/folder")).status_code == 400

    serving(story, tmp_path, allow_local_images=True)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"labels": {"com.openfaas.scale.min": "many"}}, "com.openfaas.scale.min"),
        ({"labels": {"com.openfaas.scale.min": "6", "com.openfaas.scale.max": "5"}}, "above max"),
        ({"labels": {"com.openfaas.scale.factor": "0"}}, "from 1 to 100"),
        ({"labels": {"com.openfaas.scale.factor": "101"}}, "from 1 to 100"),
        ({"labels": {"com.openfaas.scale.zero": "yes"}}, "true or false"),
        ({"labels": {"com.openfaas.scale.zero-duration": "soon"}}, "duration"),
        ({"labels": {"com.openfaas.scale.down.window": "6m"}}, "300 s"),
        ({"labels": {"com.openfaas.scale.type": "cpu"}}, "rps, capacity"),
        ({"labels": {"com.openfaas.scale.target": "-1"}}, "above 0"),
        ({"labels": {"com.openfaas.scale.target-proportion": "1.5"}}, "up to 1"),
        ({"labels": {"com.openfaas.scale.mni": "1"}}, "no label"),
        ({"annotations": {"com.openfaas.retry.codes": "soon"}}, "429,503"),
        ({"annotations": {"com.openfaas.retry.attempts": "0"}}, "from 1"),
        ({"annotations": {"com.openfaas.profile": "huge"}}, "no profile"),
        ({"limits": {"nvidia.com/gpu": "2"}}, "on one GPU"),
        ({"limits": {"amd.com/gpu": "1"}}, "nvidia.com/gpu"),
        ({"constraints": ["gpu=H100"]}, "no GPU of the kind"),
        ({"annotations": {"hotset.gpu-memory": "much"}}, "no size"),
        ({"annotations": {"hotset.gpu-memory": "0"}}, "is 0"),
        ({"envVars": {"a=b": "c"}}, "environment variable"),
        ({"envVars": {"exec_timeout": "soon"}}, "exec_timeout"),
        ({"hotset": {"max_batch": 4}}, "one request at a time"),
        ({"service": "No.Name"}, "no function name"),
        ({"namespace": "nowhere"}, "no namespace"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_deployment(tmp_path, more, says):
    async def story(faas: Faas):
        reply = await faas.deploy(**more)
        assert (reply.status_code, says in reply.json()["error"]) == (400, True), reply.text
        assert (await faas.get("/system/functions")).json() == []

    serving(story, tmp_path)


def test_keys_of_a_function(tmp_path):
    async def story(faas: Faas):
        await deploy(faas)
        await deploy(faas, "open")
        made = await faas.send("POST", "/system/keys", {"function": "env", "name": "app"})
        assert made.status_code == 201
        key = made.json()["key"]
        assert key not in (await faas.get("/system/keys")).text
        assert (await faas.get("/system/keys")).json()[0].items() >= {"name": "app", "function": "env"}.items()

        async def call(path: str, **headers: str) -> httpx.Response:
            return await faas.http.post(
                path, headers={name.replace("_", "-"): value for name, value in headers.items()}
            )

        assert (await call("/function/open")).status_code == 200
        for path in ("/function/env", "/function/env.openfaas-fn/x", "/async-function/env", "/v2/models/env/infer"):
            refused = await call(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer"), path
        assert (await call("/function/env", authorization=f"Bearer {key}")).status_code == 200
        assert (await call("/function/env", x_api_key=key)).status_code == 200
        assert (await call("/function/env", x_api_key=f"{key}x")).status_code == 401
        for body, status in (
            ({"function": "absent"}, 404),
            ({"function": "env", "name": "app"}, 409),
            ({"function": "env", "name": "A!"}, 400),
        ):
            assert (await faas.send("POST", "/system/keys", body)).status_code == status
        assert (await faas.send("DELETE", "/system/keys/app")).status_code == 202
        assert (await faas.send("DELETE", "/system/keys/app")).status_code == 404
        assert (await call("/function/env")).status_code == 200

    serving(story, tmp_path)


def test_metrics_have_openfaas_names_beside_hotsets(tmp_path):
    async def story(faas: Faas):
        await deploy(faas, labels={"com.openfaas.scale.min": "2"})
        await faas.http.post("/function/env")
        queued = await faas.http.post("/async-function/env")
        await until(lambda: not faas.queued())
        text = (await faas.get("/metrics")).text
        name = 'function_name="env.openfaas-fn"'
        for line in (
            f'gateway_function_invocation_total{{code="200",{name}}} 2.0',
            f'gateway_functions_seconds_count{{code="200",{name}}} 2.0',
            f"gateway_function_invocation_started{{{name}}} 2.0",
            f"gateway_function_invocation_inflight{{{name}}} 0.0",
            f"gateway_service_count{{{name}}} 2.0",
            f"gateway_service_ready_count{{{name}}} 2.0",
            f"gateway_service_min{{{name}}} 2.0",
            f"gateway_service_target{{{name}}} 50.0",
            f'gateway_service_target_load{{{name},scaling_type="rps"}} 50.0',
            'provider_http_requests_total{code="202",method="POST",path="/system/functions"} 1.0',
            'http_requests_total{method="POST",path="/system/functions",status="202"} 1.0',
            'http_requests_total{method="POST",path="/async-function",status="202"} 1.0',
            f'http_requests_total{{{name},status="200"}} 2.0',
            f'http_request_duration_seconds_count{{{name},status="200"}} 2.0',
            f"http_requests_in_flight{{{name}}} 0.0",
            'queue_worker_messages_submitted_total{queue_name="faas-request"} 1.0',
            'queue_worker_messages_processed_total{queue_name="faas-request"} 1.0',
            'hotset_requests_total{code="200",function="env"} 2.0',
        ):
            assert line in text.splitlines(), line
        assert queued.status_code == 202
        assert 'provider_http_request_duration_seconds_bucket{code="202"' in text
        assert f'pod_memory_working_set_bytes{{{name},namespace="openfaas-fn"}}' in text
        families = [each.name for each in text_string_to_metric_families(text)]
        assert len(families) == len(set(families)), "each name is exported once"

    serving(story, tmp_path)


def test_what_waits_in_the_queue_is_counted_by_function(tmp_path):
    async def story(faas: Faas):
        faas.node.default = FakeFunction(load_s=0.0, inference_s=3600.0)
        await faas.deploy("slow", "cat", **ON_GPU)
        for path in ("slow", "slow.openfaas-fn", "slow"):
            assert (await faas.http.post(f"/async-function/{path}")).status_code == 202
        await until(lambda: faas.front.queue.inflight.total() == 1)
        text = (await faas.get("/metrics")).text
        labels = '{function_name="slow.openfaas-fn",queue_name="faas-request"}'
        assert f"queue_worker_pending_messages{labels} 2.0" in text
        assert f"queue_worker_function_invocation_inflight{labels} 1.0" in text
        assert 'gateway_function_invocation_inflight{function_name="slow.openfaas-fn"} 1.0' in text

    serving(story, tmp_path)
