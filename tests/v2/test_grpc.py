"""The v2 protocol over gRPC, driven by Triton's asyncio client on the server's own loop, and by bare messages."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from v2_world import BODY_LIMIT, Count, Double, Echo, Scale, World, quiet_import, run

from hotset.errors import ConfigurationError
from hotset.gateway.auth import ApiKeys, Credentials, Guard, key_digest
from hotset.gateway.v2.conversion import request_parts
from hotset.gateway.v2.front import V2Config, v2_front
from hotset.gateway.v2.grpc_service import GrpcServer
from hotset.gateway.v2.refusal import Refusal
from hotset.protocol.messages import SERVICE, message_class
from hotset.store.datastore import ApiKeyRecord

with quiet_import():
    import tritonclient.grpc.aio as triton
    from tritonclient.grpc import model_config_pb2, service_pb2
    from tritonclient.utils import InferenceServerException

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
InferRequest = message_class("ModelInferRequest")


class Service:
    """A gateway with gRPC, Triton's client, and a bare channel to it."""

    def __init__(self, world: World, server: GrpcServer, client: Any, channel: Any) -> None:
        self.world = world
        self.server = server
        self.client = client
        self.channel = channel

    async def call(self, method: str, request: Any) -> Any:
        """One of the service's methods with our own messages."""
        found = SERVICE.methods_by_name[method]
        response = message_class(found.output_type.name)
        call = self.channel.unary_unary(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        return await call(request)

    async def refused(self, request: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call("ModelInfer", request)
        return caught.value.code(), str(caught.value.details())


@asynccontextmanager
async def service(tmp_path: Path, *functions: Any, admits: Any = None) -> AsyncIterator[Service]:
    async with World(tmp_path, *functions) as world:
        server = GrpcServer(world.service, "127.0.0.1", 0, max_body_bytes=BODY_LIMIT, admits=admits)
        await server.start()
        address = f"127.0.0.1:{server.port}"
        client = triton.InferenceServerClient(address)
        channel = grpc.aio.insecure_channel(address)
        try:
            yield Service(world, server, client, channel)
        finally:
            await client.close()
            await channel.close()
            await server.stop()


def rows(array: np.ndarray = ROWS) -> Any:
    given = triton.InferInput("rows", list(array.shape), "FP32")
    given.set_data_from_numpy(array)
    return given


def test_our_messages_are_the_protocols_byte_for_byte() -> None:
    theirs_by_name = {
        **service_pb2.DESCRIPTOR.message_types_by_name,
        **model_config_pb2.DESCRIPTOR.message_types_by_name,
    }

    def check(ours: Any, theirs: Any) -> None:
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), field
        for inner in ours.nested_types:
            check(inner, theirs.nested_types_by_name[inner.name])

    own = SERVICE.file.message_types_by_name
    for name, ours in own.items():
        check(ours, theirs_by_name[name])
    for method in SERVICE.methods:
        other = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[method.name]
        assert (method.input_type.name, method.output_type.name) == (other.input_type.name, other.output_type.name)


def test_the_compiled_protocol_is_the_one_in_the_source(tmp_path: Path) -> None:
    import importlib.util

    script = Path(__file__).parents[2] / "scripts" / "compile_protocol.py"
    spec = importlib.util.spec_from_file_location("compile_protocol", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.compile_protocol(tmp_path / "now.binpb")
    assert (tmp_path / "now.binpb").read_bytes() == (module.PROTOCOL / "open_inference.binpb").read_bytes()


def test_tritons_client_finds_models_and_calls_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with service(tmp_path, Scale, Double) as each:
            client = each.client
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("scale")
            assert not await client.is_model_ready("absent")
            assert (await client.get_server_metadata()).name == "hotset"
            metadata = await client.get_model_metadata("scale")
            assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs] == [
                ("rows", "FP32", [-1, 3]),
                ("by", "FP64", [1]),
            ]
            config = (await client.get_model_config("scale")).config
            assert config.input[0].name == "rows"

            result = await client.infer("scale", [rows()], request_id="7", parameters={"by": 2.0})
            assert result.as_numpy("output").tolist() == [6.0, 24.0]
            assert result.get_response().id == "7"
            wanted = [triton.InferRequestedOutput("output", class_count=1)]
            classes = await client.infer("scale", [rows()], outputs=wanted)
            assert classes.as_numpy("output").tolist() == [b"12.000000:1"]

            (stats,) = (await client.get_inference_statistics("scale")).model_stats
            assert stats.inference_stats.success.count == 2
            assert (await client.get_trace_settings()).settings["trace_level"].value == ["OFF"]
            await client.update_trace_settings(settings={"trace_level": ["OFF"]})
            with pytest.raises(InferenceServerException, match="tracing is off"):
                await client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})

    run(story)


def test_repository_and_shared_memory_calls(tmp_path: Path) -> None:
    async def story() -> None:
        async with service(tmp_path, Scale) as each:
            client = each.client
            (entry,) = (await client.get_model_repository_index()).models
            assert (entry.name, entry.state) == ("scale", "READY")
            await client.load_model("scale")
            with pytest.raises(InferenceServerException, match="load takes no config"):
                await client.load_model("scale", config="{}")
            await client.unload_model("scale")
            with pytest.raises(InferenceServerException, match="unloaded"):
                await client.infer("scale", [rows()])

            assert not (await client.get_system_shared_memory_status()).regions
            with pytest.raises(InferenceServerException, match="cannot be opened"):
                await client.register_system_shared_memory("region", "/hotset-not-there", 64)
            await client.unregister_system_shared_memory("region")
            assert not (await client.get_cuda_shared_memory_status()).regions
            with pytest.raises(InferenceServerException, match="CUDA shared memory is not supported"):
                await client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 64)
            await client.unregister_cuda_shared_memory("region")

    run(story)


def test_typed_contents_are_read_like_raw_ones(tmp_path: Path) -> None:
    samples = {
        "BOOL": ("bool_contents", [True, False]),
        "INT8": ("int_contents", [-1, 2]),
        "INT64": ("int64_contents", [-(2**40), 1]),
        "UINT16": ("uint_contents", [0, 65535]),
        "UINT64": ("uint64_contents", [2**63, 1]),
        "FP32": ("fp32_contents", [0.5, 2.0]),
        "FP64": ("fp64_contents", [0.25, 4.0]),
        "BYTES": ("bytes_contents", [b"a", b"bc"]),
    }

    async def story() -> None:
        async with service(tmp_path, Echo) as each:
            for datatype, (field, values) in samples.items():
                request = InferRequest(model_name="echo")
                given = request.inputs.add(name="x", datatype=datatype, shape=[2])
                getattr(given.contents, field).extend(values)
                response = await each.call("ModelInfer", request)
                assert response.outputs[0].datatype == datatype
                assert list(response.outputs[0].shape) == [2]
                if datatype == "BYTES":
                    assert response.raw_output_contents[0] == b"\1\0\0\0a\2\0\0\0bc"

    run(story)


def test_what_does_not_fit_is_an_invalid_argument(tmp_path: Path) -> None:
    def request(datatype: str = "FP32", **raw: Any) -> Any:
        made = InferRequest(model_name="echo", **raw)
        made.inputs.add(name="x", datatype=datatype, shape=[1])
        return made

    async def story() -> None:
        async with service(tmp_path, Echo, Count) as each:
            beyond = request("INT8")
            beyond.inputs[0].contents.int_contents.append(300)
            mixed = request(raw_input_contents=[b"\0\0\0\0"])
            mixed.inputs[0].contents.fp32_contents.append(1)
            extra = request(raw_input_contents=[b"\0\0\0\0", b"\0"])
            for wrong, told in (
                (request("FP16"), "no typed contents; send it as raw_input_contents"),
                (request("FP99"), "no typed contents; use one of"),
                (beyond, "outside the range of INT8"),
                (mixed, "of all inputs as raw_input_contents, or of none"),
                (extra, "belong to no input"),
                (request(raw_input_contents=[b"\0"]), "x: has 1 bytes of data"),
                (request("FP32"), "x: has 0 bytes of data"),
            ):
                code, details = await each.refused(wrong)
                assert (code, told in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
            code, _ = await each.refused(InferRequest(model_name="absent"))
            assert code == grpc.StatusCode.NOT_FOUND
            streaming = InferRequest(model_name="count")
            streaming.inputs.add(name="upto", datatype="INT64", shape=[1]).contents.int64_contents.append(1)
            code, details = await each.refused(streaming)
            assert "ModelStreamInfer" in details
            large = InferRequest(model_name="echo", raw_input_contents=[bytes(3 * BODY_LIMIT)])
            code, _ = await each.refused(large)
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED

    run(story)


def test_parameters_of_every_kind_reach_the_function() -> None:
    request = InferRequest(model_name="m", id="i")
    request.parameters["flag"].bool_param = True
    request.parameters["number"].int64_param = -1
    request.parameters["text"].string_param = "t"
    request.parameters["ratio"].double_param = 0.5
    request.parameters["nothing"].SetInParent()
    header, binary = request_parts(request)
    assert b'"flag":true,"number":-1' in header or b'"flag":true' in header
    assert (b'"nothing":null' in header, binary) == (True, b"")
    request.inputs.add(name="x", datatype="FP99", shape=[1])
    with pytest.raises(Refusal, match="FP99"):
        request_parts(request)


def test_a_stream_of_requests_is_answered_in_order_and_a_streaming_function_item_by_item(tmp_path: Path) -> None:
    def ask(request_id: str, model: str, name: str, array: np.ndarray, *, final: bool = False) -> Any:
        request = InferRequest(model_name=model, id=request_id, raw_input_contents=[array.tobytes()])
        datatype = "FP32" if array.dtype == np.float32 else "INT64"
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if final:
            request.parameters["triton_enable_empty_final_response"].bool_param = True
        return request

    requests = [
        ask("a", "scale", "rows", ROWS),
        ask("b", "count", "upto", np.array([2]), final=True),
        ask("c", "absent", "rows", ROWS),
        ask("d", "count", "upto", np.array([9])),
        ask("e", "scale", "rows", ROWS[:1]),
        ask("f", "scale", "rows", ROWS.reshape(3, 2)),
    ]

    async def story() -> None:
        async with service(tmp_path, Count, Scale) as each:
            response = message_class("ModelStreamInferResponse")
            stream = each.channel.stream_stream(
                f"/{SERVICE.full_name}/ModelStreamInfer",
                request_serializer=InferRequest.SerializeToString,
                response_deserializer=response.FromString,
            )(iter(requests))
            told: list[Any] = []
            async for answer in stream:
                inner = answer.infer_response
                if answer.error_message:
                    told.append((inner.id, answer.error_message.partition(":")[0]))
                    continue
                final = inner.parameters["triton_final_response"].bool_param
                dtype = "<f4" if inner.id in "ae" else "<i8"
                values = [np.frombuffer(raw, dtype).tolist() for raw in inner.raw_output_contents]
                told.append((inner.id, values, final))
            assert told == [
                ("a", [[3.0, 12.0]], True),
                ("b", [[0]], False),
                ("b", [[1]], False),
                ("b", [], True),
                ("c", "there is no model 'absent'"),
                *[("d", [[value]], False) for value in range(5)],
                ("d", "five is too many"),
                ("e", [[3.0]], True),
                ("f", "rows"),
            ]

    run(story)


def test_a_client_that_leaves_a_stream_leaves_its_calls(tmp_path: Path) -> None:
    async def story() -> None:
        async with service(tmp_path, Scale) as each:
            each.world.node.held = []
            request = InferRequest(model_name="scale", raw_input_contents=[ROWS.tobytes()])
            request.inputs.add(name="rows", datatype="FP32", shape=[2, 3])
            response = message_class("ModelStreamInferResponse")
            stream = each.channel.stream_stream(
                f"/{SERVICE.full_name}/ModelStreamInfer",
                request_serializer=InferRequest.SerializeToString,
                response_deserializer=response.FromString,
            )()
            await stream.write(request)
            while not each.world.control.calls:
                await asyncio.sleep(0.001)
            stream.cancel()
            while each.world.control.calls:
                await asyncio.sleep(0.001)
            each.world.node.release()

    run(story)


def test_keys_and_credentials_are_asked_for_as_over_http(tmp_path: Path) -> None:
    keys = ApiKeys([ApiKeyRecord(name="k", function="scale", digest=key_digest(b"secret"), created_at_s=0.0)])
    guard = Guard(None, Credentials("ada", "pw"), keys)  # type: ignore[arg-type]
    user = {"authorization": f"Basic {base64.b64encode(b'ada:pw').decode()}"}

    async def story() -> None:
        async with service(tmp_path, Scale, Echo, admits=guard.admits) as each:
            client = each.client
            assert await client.is_server_live()
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                await client.infer("scale", [rows()])
            assert await client.infer("scale", [rows()], headers={"x-api-key": "secret"})
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                await client.get_model_repository_index()
            assert (await client.get_model_repository_index(headers=user)).models
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                await client.register_system_shared_memory("in", "/nothing", 8)
            with pytest.raises(InferenceServerException, match="cannot be opened"):
                await client.register_system_shared_memory("in", "/nothing", 8, headers=user)
            assert not guard.admits("/v2/systemsharedmemory/region/in/register", [])
            assert not guard.admits("/v2/cudasharedmemory/status", [])

            async def requests() -> AsyncIterator[dict[str, Any]]:
                yield {"model_name": "scale", "inputs": [rows()]}

            async for _, error in client.stream_infer(requests()):
                assert "needs a key" in str(error)

    run(story)


def test_the_least_of_a_deadline_and_the_timeout_parameter_counts(tmp_path: Path) -> None:
    async def story() -> None:
        async with service(tmp_path, Scale) as each:
            each.world.node.held = []
            with pytest.raises(InferenceServerException, match=r"DEADLINE_EXCEEDED|longer than"):
                await each.client.infer("scale", [rows()], timeout=150_000)
            each.world.node.release()

    run(story)


def test_the_front_opens_and_closes_with_its_server(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale) as world:
            parts = (world.control, world.deployments, world.application, world.bodies)
            async with v2_front(*parts, V2Config(grpc_port=0)) as application:
                assert application is not world.application
            taken = GrpcServer(world.service, "127.0.0.1", 0, max_body_bytes=BODY_LIMIT)
            await taken.start()
            with pytest.raises(ConfigurationError, match="--grpc-port"):
                async with v2_front(*parts, V2Config(grpc_port=taken.port)):
                    pass
            await taken.stop()

    run(story)
