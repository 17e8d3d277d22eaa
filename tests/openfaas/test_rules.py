"""The ten rules that a naive implementation of OpenFaaS's API breaks, one test each."""

from __future__ import annotations

import json

import pytest
from faas_world import ALPINE, ON_GPU, Faas, run, serving

from hotset.gateway.auth import Credentials
from hotset.gateway.openfaas.info import Role
from hotset.gateway.openfaas.resources import GpuProfile


def test_rule_1_chunked_bodies_are_taken_on_every_route(tmp_path):
    async def story(faas: Faas):
        deployment = {"service": "cat", "image": ALPINE, "envProcess": "cat"}
        for method, path, body, status in (
            ("POST", "/system/functions", deployment, 202),
            ("PUT", "/system/functions", deployment, 202),
            ("POST", "/system/scale-function/cat", {"serviceName": "cat", "replicas": 2}, 202),
            ("POST", "/system/secrets", {"name": "key", "value": "x"}, 201),
            ("PUT", "/system/secrets", {"name": "key", "value": "y"}, 202),
            ("DELETE", "/system/secrets", {"name": "key"}, 202),
            ("POST", "/system/namespace/", {"name": "dev"}, 201),
            ("PUT", "/system/namespace/dev", {"name": "dev", "labels": {"a": "b"}}, 202),
            ("POST", "/system/alert", {"alerts": []}, 200),
            ("POST", "/async-function/cat", {"some": "body"}, 202),
            ("DELETE", "/system/functions", {"functionName": "cat"}, 202),
        ):
            reply = await faas.forwarded(method, path, json.dumps(body).encode())
            assert reply.status_code == status, (method, path, reply.text)
        await faas.deploy("cat", "cat")
        assert (await faas.forwarded("POST", "/function/cat", b"a body in many pieces")).text == "a body in many pieces"

    serving(story, tmp_path)


def test_rule_2_a_name_and_the_name_with_its_namespace_are_one_function(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("cat", "cat")
        for path in ("cat", "cat.openfaas-fn", "cat.openfaas-fn/", "cat.openfaas-fn/deeper?a=b"):
            assert (await faas.http.post(f"/function/{path}", content=b"meow")).text == "meow"
        assert (await faas.status("cat.openfaas-fn")) == (await faas.status("cat"))
        assert (await faas.http.post("/function/cat.dev", content=b"")).status_code == 404
        assert (await faas.http.post("/function/.openfaas-fn")).status_code == 404
        await faas.send("POST", "/system/namespace/", {"name": "dev"})
        assert (await faas.deploy("cat", "env", namespace="dev")).status_code == 202
        assert (await faas.http.post("/function/cat", content=b"meow")).text == "meow"
        assert "Http_Method=POST" in (await faas.http.post("/function/cat.dev", content=b"meow")).text

    serving(story, tmp_path)


def test_rule_3_a_put_of_an_unknown_function_is_404(tmp_path):
    async def story(faas: Faas):
        assert (await faas.deploy(method="PUT")).status_code == 404
        assert (await faas.deploy(method="POST")).status_code == 202
        assert (await faas.deploy(method="PUT")).status_code == 202

    serving(story, tmp_path)


def test_rule_4_the_query_an_openfaas_gateway_makes_is_answered(tmp_path):
    async def story(faas: Faas):
        query = 'sum(gateway_function_invocation_total{function_name=~".*.openfaas-fn"}) by (function_name)'
        empty = {"status": "success", "data": {"resultType": "vector", "result": []}}
        assert (await faas.get("/api/v1/query", query=query)).json() == empty
        await faas.deploy("cat", "cat")
        await faas.deploy("env", "env")
        for _ in range(2):
            await faas.http.post("/function/cat", content=b"x")
        result = (await faas.get("/api/v1/query", query=query)).json()["data"]["result"]
        assert {each["metric"]["function_name"]: each["value"][1] for each in result} == {
            "cat.openfaas-fn": "2",
            "env.openfaas-fn": "0",
        }
        one = (await faas.get("/api/v1/query", query=query.replace("=~", "=").replace(".*.", "cat."))).json()
        assert [each["metric"]["function_name"] for each in one["data"]["result"]] == ["cat.openfaas-fn"]
        assert (await faas.get("/api/v1/query", query="up")).json() == empty
        nothing = await faas.get("/api/v1/query")
        assert (nothing.status_code, nothing.json()["errorType"]) == (400, "bad_data")
        everything = await faas.get("/api/v1/query", query="gateway_function_invocation_total")
        assert len(everything.json()["data"]["result"]) == 2

    serving(story, tmp_path)


def test_rule_5_the_namespace_is_read_in_the_query_and_in_the_body(tmp_path):
    async def story(faas: Faas):
        await faas.send("POST", "/system/namespace/", {"name": "dev"})
        await faas.deploy("in-body", namespace="dev")
        body = {"service": "in-query", "image": ALPINE, "envProcess": "env"}
        assert (await faas.send("POST", "/system/functions?namespace=dev", body)).status_code == 202
        listed = (await faas.get("/system/functions", namespace="dev")).json()
        assert [(each["name"], each["namespace"]) for each in listed] == [("in-body", "dev"), ("in-query", "dev")]
        assert (await faas.get("/system/functions")).json() == []
        scale = "/system/scale-function/in-body"
        in_body = {"serviceName": "in-body", "replicas": 2, "namespace": "dev"}
        assert (await faas.send("POST", scale, in_body)).status_code == 202
        in_query = {"serviceName": "in-body", "replicas": 3}
        assert (await faas.send("POST", f"{scale}?namespace=dev", in_query)).status_code == 202
        assert (await faas.send("POST", scale, in_query)).status_code == 404
        both = await faas.send("POST", f"{scale}?namespace=openfaas-fn", in_body)
        assert both.status_code == 202, "the query wins only if the body has none"
        assert (await faas.get("/system/function/in-body", namespace="dev")).json()["replicas"] == 2
        assert (await faas.get("/system/functions", namespace="nowhere")).status_code == 400
        removed = {"functionName": "in-body", "namespace": "dev"}
        assert (await faas.send("DELETE", "/system/functions", removed)).status_code == 202

    serving(story, tmp_path)


def test_rule_6_a_provider_url_that_ends_in_a_slash_is_all_a_gateway_needs(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("cat", "cat")
        provider = "http://127.0.0.1:8080/"
        assert (await faas.http.get(f"{provider}system/function/cat?namespace=openfaas-fn&usage=false")).is_success
        assert (await faas.http.post(f"{provider}function/cat", content=b"x")).text == "x"

    serving(story, tmp_path)


def test_rule_7_what_became_of_a_gpu_request_survives_a_gateway_that_drops_unknown_fields(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("cat", "cat", **ON_GPU)
        await faas.http.post("/function/cat", content=b"x")
        (listed,) = (await faas.get("/system/functions")).json()
        assert listed["limits"] == {"nvidia.com/gpu": "1"}
        assert listed["annotations"] == {
            "hotset.gpu-memory": "100MiB",
            "hotset.gpu": "local/virtual:0",
            "hotset.gpu-memory-now": "100 MiB",
            "hotset.gpu-request": "annotation hotset.gpu-memory",
        }

    serving(story, tmp_path)


def test_rule_8_zero_replicas_are_reached_from_the_providers_side_and_left_by_a_call(tmp_path):
    async def story(faas: Faas):
        await faas.deploy("cat", "cat", **ON_GPU)
        await faas.http.post("/function/cat", content=b"x")
        assert (await faas.status("cat"))["hotset"]["gpus"] == ["local/virtual:0"]
        await faas.send("POST", "/system/scale-function/cat", {"serviceName": "cat", "replicas": 0})
        status = await faas.status("cat")
        assert (status["replicas"], status["availableReplicas"], status["hotset"]["gpus"]) == (0, 0, [])
        # What a gateway that starts from zero does: set one, and wait until it is there.
        await faas.send(
            "POST", "/system/scale-function/cat?namespace=openfaas-fn", {"serviceName": "cat", "replicas": 1}
        )
        assert (await faas.status("cat"))["availableReplicas"] == 1
        await faas.send("POST", "/system/scale-function/cat", {"serviceName": "cat", "replicas": 0})
        assert (await faas.http.post("/function/cat", content=b"again")).text == "again"
        assert (await faas.status("cat"))["replicas"] == 1

    serving(story, tmp_path)


@pytest.mark.parametrize(
    ("asked", "source", "declared"),
    [
        ({"limits": {"nvidia.com/gpu": "1"}}, "limits nvidia.com/gpu", None),
        ({"requests": {"nvidia.com/gpu": "1"}}, "requests nvidia.com/gpu", None),
        ({"labels": {"hotset.gpu-memory": "64MiB"}}, "label hotset.gpu-memory", 64 << 20),
        ({"annotations": {"hotset.gpu-memory": "64MiB"}}, "annotation hotset.gpu-memory", 64 << 20),
        ({"annotations": {"com.openfaas.profile": "small"}}, "profile small", 32 << 20),
        ({"constraints": ["gpu-memory=64MiB"]}, "constraint gpu-memory", 64 << 20),
        ({"constraints": ["gpu == virtual"]}, "constraint gpu", None),
        ({"hotset": {"gpu_memory": "16MiB"}, "constraints": ["gpu-memory=64MiB"]}, "hotset.gpu_memory", 16 << 20),
    ],
)
def test_rule_9_a_gpu_can_be_asked_for_in_every_way_that_reaches_the_server(tmp_path, asked, source, declared):
    async def story(faas: Faas):
        assert (await faas.deploy("cat", "cat", **asked)).status_code == 202
        status = await faas.status("cat")
        assert status["hotset"]["kind"] == "gpu"
        assert status["hotset"]["gpu_memory_bytes"] == declared
        assert status["annotations"]["hotset.gpu-request"] == source
        assert status["limits"] == {"nvidia.com/gpu": "1"}

    serving(story, tmp_path, profiles={"small": GpuProfile(gpu_memory="32MiB")})


def test_rule_10_everything_under_system_asks_who_it_is_and_calls_never_do(tmp_path):
    async def story(faas: Faas):
        faas.http.auth = ("admin", "secret")
        await faas.push()
        await faas.deploy("cat", "cat")
        faas.http.auth = None
        document = (await faas.get("/openapi.json")).json()
        protected = [
            (method, path)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            if "security" in operation
        ]
        assert {path for _, path in protected} >= {
            "/system/info",
            "/system/namespaces",
            "/system/namespace/{name}",
            "/system/alert",
            "/system/functions",
        }
        for method, path in [*protected, ("get", "/system/telemetry"), ("get", "/system")]:
            reply = await faas.http.request(method, path)
            assert (reply.status_code, reply.text) == (401, "invalid credentials"), path
            assert reply.headers["www-authenticate"] == 'Basic realm="Restricted"'
        for path in ("/healthz", "/metrics", "/function/cat", "/openapi.json", "/api/v1/query?query=up"):
            assert (await faas.http.get(path)).status_code == 200, path
        assert (await faas.http.post("/async-function/cat", content=b"")).status_code == 202
        assert (await faas.http.get("/function/cat/", follow_redirects=False)).status_code == 200
        for auth in (("admin", "wrong"), ("", ""), ("admin", "secret "), ("secret", "admin")):
            assert (await faas.http.get("/system/info", auth=auth)).status_code == 401
        for header in ("Bearer YWRtaW46c2VjcmV0", "Basic !", "Basic", ""):
            headers = {"authorization": header}
            assert (await faas.http.get("/system/info", headers=headers)).status_code == 401
        assert (await faas.http.get("/system/info", auth=("admin", "secret"))).status_code == 200

    async def whole():
        async with Faas(tmp_path, credentials=Credentials("admin", "secret")) as faas:
            await story(faas)

    run(whole)


@pytest.mark.parametrize(
    ("role", "forwarded_for", "behind"),
    [
        (Role.AUTO, "127.0.0.1:51234", True),
        (Role.AUTO, "10.0.0.1, [::1]:51234", True),
        (Role.AUTO, "10.0.0.1", False),
        (Role.AUTO, None, False),
        (Role.PROVIDER, None, True),
        (Role.GATEWAY, "127.0.0.1:51234", False),
    ],
)
def test_info_is_a_providers_behind_a_gateway_and_a_gateways_else(tmp_path, role, forwarded_for, behind):
    async def story(faas: Faas):
        headers = {"x-forwarded-host": "a"} | ({"x-forwarded-for": forwarded_for} if forwarded_for else {})
        info = (await faas.http.get("/system/info", headers=headers)).json()
        provider = info if behind else info["provider"]
        assert provider["provider"] == provider["orchestration"] == "hotset"
        assert provider["version"]["sha"]
        assert provider["version"]["release"]
        assert behind or (info["version"]["sha"] and info["version"]["release"] and info["arch"])

    serving(story, tmp_path, role=role)
