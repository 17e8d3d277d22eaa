"""The OpenAPI document, and a fuzzer that holds the server to it: no 5xx, nothing that the document does not say."""

from __future__ import annotations

import os

import pytest
import schemathesis
from faas_world import Faas, run
from hypothesis import HealthCheck, Phase, given, settings
from kill_and_restart import push_and_deploy, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
EXAMPLES = int(os.environ.get("HOTSET_FUZZ_EXAMPLES", "2"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    with serving(folder / "data") as (client, _):
        push_and_deploy(client, folder, "env", "env")
        yield client


def test_no_request_that_the_document_allows_breaks_the_server(server):
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) > 40
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def fuzz(case):
            if case.path.startswith("/system/logs"):
                case.query["follow"] = "false"
            case.call_and_validate(base_url=str(server.base_url), checks=CHECKS, timeout=20)

        fuzz()
    health = server.get("/healthz")
    assert health.status_code == 200
    assert health.headers["x-served-by"].startswith("hotset/")


def test_everything_that_is_served_is_described(tmp_path):
    async def story():
        async with Faas(tmp_path) as faas:
            document = (await faas.get("/openapi.json")).json()
            assert document["openapi"].startswith("3.1")
            assert "/async-function/{name}" in document["paths"]
            assert "/system/images/{name}" in document["paths"]
            seen = set()
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    assert operation["summary"]
                    assert operation["operationId"] not in seen, path
                    seen.add(operation["operationId"])
            deployment = document["components"]["schemas"]["FunctionDeployment"]
            assert {"service", "image", "envProcess", "limits", "hotset"} <= set(deployment["properties"])
            resources = document["components"]["schemas"]["Resources"]
            assert "nvidia.com/gpu" in resources["properties"]

    run(story)
