"""The OpenAPI document of everything the server serves, made from the operations and the records they name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

import hotset
from hotset.gateway.operations import Answer, Operation, Parameter
from hotset.gateway.web import JSON

_REFERENCE = "#/components/schemas/{name}"


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """What every error looks like; more fields may say more."""

    error: str
    """One sentence that says what to do."""


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = [Error, *(kind for each in operations for kind in _kinds(each))]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    known = dict(zip(map(repr, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _described(operation, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hotset",
            "version": hotset.__version__,
            "summary": "Function-as-a-Service for ML inference on GPUs",
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"basic": {"type": "http", "scheme": "basic"}}},
    }


def _kinds(operation: Operation) -> list[Any]:
    used: list[Any] = []
    for answer in operation.answers.values():
        used += answer.kind if isinstance(answer.kind, tuple) else [answer.kind] if answer.kind is not None else []
    return used if operation.body is None else [operation.body, *used]


def _described(operation: Operation, known: dict[str, Any]) -> dict[str, Any]:
    words = re.sub("[^a-z0-9]+", "_", f"{operation.method}{operation.path}".lower())
    described: dict[str, Any] = {
        "operationId": words if operation.path.endswith("/") else words.rstrip("_"),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            **{str(status): _answer(answer, known) for status, answer in operation.answers.items()},
            "default": {"description": "An error.", "content": {JSON: {"schema": known[repr(Error)]}}},
        },
    }
    if operation.parameters:
        described["parameters"] = [_parameter(each) for each in operation.parameters]
    if operation.body is not None:
        described["requestBody"] = {
            "required": operation.body_required,
            "content": {JSON: {"schema": known[repr(operation.body)]}},
        }
    elif operation.raw_body is not None:
        described["requestBody"] = {"content": {operation.raw_body: {"schema": {}}}}
    if operation.protected:
        described["security"] = [{"basic": []}, {}]
    return described


def _answer(answer: Answer, known: dict[str, Any]) -> dict[str, Any]:
    if answer.media is None:
        return {"description": answer.text}
    schema: dict[str, Any] = {}
    if isinstance(answer.kind, tuple):
        schema = {"anyOf": [known[repr(kind)] for kind in answer.kind]}
    elif answer.kind is not None:
        schema = known[repr(answer.kind)]
    return {"description": answer.text, "content": {answer.media: {"schema": schema}}}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required,
        "description": parameter.text,
        "schema": dict(parameter.schema),
    }
