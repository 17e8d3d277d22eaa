"""``/ui/``: a page that shows GPUs, what is in their memory, and functions, and calls them.

Three files beside this one, served as they are and using the server's own API: nothing is fetched from anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from hotset.gateway.operations import Answer, Operation, name_parameter

PAGE = "index.html"
_TYPES: Mapping[str, str] = {PAGE: "text/html", "ui.css": "text/css", "ui.js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Dashboard:
    def __init__(self) -> None:
        folder = files("hotset.gateway") / "ui"
        self._files = {name: (folder / name).read_bytes() for name in _TYPES}

    def operations(self) -> list[Operation]:
        moved = {307: Answer(text="It is at /ui/.", media=None)}
        return [
            *(
                Operation(
                    method="GET",
                    path=path,
                    handler=self.moved,
                    summary="To the page that shows what the server does",
                    tag="server",
                    answers=moved,
                    protected=path != "/",
                )
                for path in ("/", "/ui")
            ),
            Operation(
                method="GET",
                path="/ui/",
                handler=self.file,
                summary="The page that shows what the server does",
                tag="server",
                answers={200: Answer(text="The page.", media="text/html")},
            ),
            Operation(
                method="GET",
                path="/ui/{file}",
                handler=self.file,
                summary="What the page consists of",
                tag="server",
                parameters=(name_parameter("Name of a file.", "file", "^[a-z.]+$"),),
                answers={200: Answer(text="The file.", media="*/*")},
            ),
        ]

    async def moved(self, request: Request) -> Response:
        return RedirectResponse("/ui/")

    async def file(self, request: Request) -> Response:
        name = request.path_params.get("file", PAGE)
        if name not in self._files:
            raise HTTPException(404, f"there is no page {name[:80]!r}: see /ui/")
        return Response(self._files[name], headers=_HEADERS, media_type=_TYPES[name])
