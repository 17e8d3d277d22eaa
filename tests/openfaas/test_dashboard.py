"""The page under /ui/, and that no other site's page can use a browser's credentials to change anything."""

from __future__ import annotations

import re

import pytest
from faas_world import Faas, run, serving

from hotset.gateway.auth import Credentials

ADMIN = Credentials("admin", "open sesame")
AUTH = ("admin", "open sesame")


def test_the_page_is_served_whole_and_fetches_nothing_from_elsewhere(tmp_path):
    async def story(faas: Faas):
        for path in ("/", "/ui"):
            moved = await faas.get(path)
            assert (moved.status_code, moved.headers["location"]) == (307, "/ui/")
        page = await faas.get("/ui/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert sorted(named) == ["data:,", "ui.css", "ui.js"]
        parts = {name: (await faas.get(f"/ui/{name}")) for name in ("ui.css", "ui.js")}
        assert [each.status_code for each in parts.values()] == [200, 200]
        assert parts["ui.js"].headers["content-type"].startswith("text/javascript")
        for text in (page.text, *(each.text for each in parts.values())):
            assert not re.search(r"https?://|innerHTML|eval\(", text)
        used = set(re.findall(r'\$\("([\w-]+)"\)', parts["ui.js"].text))
        assert used <= set(re.findall(r'id="([\w-]+)"', page.text)), "the script finds what it looks for"
        assert (await faas.get("/ui/absent.js")).status_code == 404

    serving(story, tmp_path)


def test_the_page_asks_who_it_is_for(tmp_path):
    async def story(faas: Faas):
        for path in ("/ui", "/ui/", "/ui/ui.js", "/system/telemetry"):
            refused = await faas.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Basic realm="Restricted"')
            assert (await faas.http.get(path, auth=AUTH)).status_code in (200, 307)
        assert (await faas.get("/")).status_code == 307

    async def whole() -> None:
        async with Faas(tmp_path, credentials=ADMIN) as faas:
            await story(faas)

    run(whole)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"origin": "http://127.0.0.1:8080"}, 202),
        ({"origin": "http://gateway.example.com", "x-forwarded-host": "gateway.example.com"}, 202),
        ({"origin": "https://elsewhere.example.com", "sec-fetch-site": "same-origin"}, 202),
        ({"sec-fetch-site": "none"}, 202),
        ({"origin": "https://elsewhere.example.com"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:8080"}, 403),
    ],
)
def test_another_sites_page_changes_nothing(tmp_path, headers, status):
    async def story(faas: Faas):
        await faas.deploy()
        body = {"serviceName": "env", "replicas": 2}
        assert (await faas.send("POST", "/system/scale-function/env", body, **headers)).status_code == status
        assert (await faas.status("env"))["replicas"] == (2 if status == 202 else 1)
        assert (await faas.http.get("/system/functions", headers=headers)).status_code == 200
        assert (await faas.http.post("/function/env", headers=headers)).status_code == 200, "calls are for everybody"

    serving(story, tmp_path)


def test_telemetry_is_numbers(tmp_path):
    async def story(faas: Faas):
        await faas.deploy()
        await faas.http.post("/function/env")
        told = (await faas.get("/system/telemetry")).json()
        assert (told["functions"], told["invocations"], told["gpus"], told["hot_models"]) == (1, 1, 1, 0)
        assert told["provider"] == "hotset"

    serving(story, tmp_path)
