"""The one Prometheus query that an OpenFaaS gateway makes.

With no Prometheus to ask, an OpenFaaS gateway drops the connection of whoever lists functions; so the query is
answered here, from the counters, and gives ``invocationCount``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hotset.gateway.operations import Answer, Operation, Parameter
from hotset.gateway.web import json_response

INVOCATIONS = "gateway_function_invocation_total"
_QUERY = {"type": "string", "minLength": 1}
_MATCHER = re.compile(r'function_name\s*=(~?)\s*"([^"]{0,300})"')


class Vector(msgspec.Struct, frozen=True, kw_only=True):
    """One series: its labels, and when which value was read."""

    metric: dict[str, str]
    value: tuple[float, str]


class QueryData(msgspec.Struct, frozen=True, kw_only=True, rename={"result_type": "resultType"}):
    result_type: str
    result: list[Vector]


class QueryResult(msgspec.Struct, frozen=True, kw_only=True):
    status: str
    data: QueryData


class QueryError(msgspec.Struct, frozen=True, kw_only=True, rename={"error_type": "errorType"}):
    status: str
    error_type: str
    error: str


class QueryApi:
    """``counts`` yields ``NAME.NAMESPACE`` and the number of its calls, for every function that is deployed."""

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path="/api/v1/query",
                handler=self.query,
                summary="Calls of each function, as an OpenFaaS gateway asks Prometheus for them",
                tag="metrics",
                parameters=(
                    Parameter(name="query", text="PromQL, as far as OpenFaaS uses it.", required=True, schema=_QUERY),
                ),
                answers={
                    200: Answer(text="A vector.", kind=QueryResult),
                    400: Answer(text="There is no query.", kind=QueryError),
                },
                protected=False,
            )
        ]

    async def query(self, request: Request) -> Response:
        text = request.query_params.get("query", "")
        if not text:
            return json_response(QueryError(status="error", error_type="bad_data", error="query: give one"), 400)
        now_s = time.time()
        chosen = _chosen(text, self._counts()) if INVOCATIONS in text else {}
        vectors = [
            Vector(metric={"function_name": name}, value=(round(now_s, 3), str(count)))
            for name, count in chosen.items()
        ]
        return json_response(QueryResult(status="success", data=QueryData(result_type="vector", result=vectors)))


def _chosen(query: str, counts: dict[str, int]) -> dict[str, int]:
    """The functions a query is about: all, one name, or those that end as in ``.*.NAMESPACE``.

    No other pattern is understood: one from a stranger is not run as a regular expression.
    """
    matcher = _MATCHER.search(query)
    if matcher is None:
        return counts
    pattern = matcher[2].replace("\\", "")
    if matcher[1] and pattern.startswith(".*"):
        return {name: count for name, count in counts.items() if name.endswith(pattern[2:])}
    return {name: count for name, count in counts.items() if name == pattern}
