"""Documents against what they describe: links lead somewhere, and no setting and no metric is left out."""

from __future__ import annotations

import re
from pathlib import Path

import cli_page
import pytest

from hotset.cli.serve import serve

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text()):
        if "://" in target:
            continue
        leads_to = page.parent / target if target else page
        assert leads_to.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in _anchors(leads_to), f"{page.name}: {target} has no section #{anchor}"


def test_every_setting_of_the_server_is_explained() -> None:
    flags = {option for parameter in serve.params for option in parameter.opts if option.startswith("--")}
    missing = {flag for flag in flags if f"`{flag}`" not in OPERATIONS}
    assert not missing, f"explain in docs/operations.md: {sorted(missing)}"
    for name in ("policy", "eviction"):
        (default,) = (parameter.default for parameter in serve.params if parameter.name == name)
        (row,) = (line for line in OPERATIONS.splitlines() if line.startswith(f"| `--{name}`"))
        assert f"| `{default}`" in row, f"the default of --{name} is {default!r}: say so in docs/operations.md"


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    assert cli_page.PAGE.read_text() == cli_page.page(), "run `python scripts/cli_page.py` and commit docs/cli.md"


def test_every_metric_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src" / "hotset" / "gateway").rglob("*.py"))
    counters = re.findall(r"CounterMetricFamily\(\s*\"(\w+)\"", source)
    others = re.findall(r"(?:Gauge|Histogram)MetricFamily\(\s*\"(\w+)\"", source)
    counted = re.findall(r"\(\"\w+\", \"(hotset_\w+)\", \"", source)
    names = {*(f"{name}_total" for name in (*counters, *counted)), *others}
    assert len(names) > 15
    missing = {name for name in names if f"`{name}`" not in OPERATIONS}
    assert not missing, f"explain in docs/operations.md: {sorted(missing)}"
