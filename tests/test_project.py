"""What CONTRIBUTING promises about the project as a whole, held by tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from documents import run_document
from hotset.scheduling.eviction import EVICTIONS
from hotset.scheduling.policies import POLICIES
from hotset.store.environments import WORKER_PACKAGES

ROOT = Path(__file__).parent.parent
MOST_LINES = 500
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".html", ".css", ".js", ".proto", ""}


def project_files() -> list[Path]:
    """What git tracks or would track, of what is there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return [path for line in listed.splitlines() if (path := ROOT / line).is_file()]


FILES = project_files()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def test_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in FILES
        if path.suffix == ".py" and (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long, f"split these by their questions (R6): {long}"


def test_nothing_names_a_path_of_somebodys_machine() -> None:
    homes = re.compile(r"(?<![\w.-])/(?:" + "|".join(["home", "root", "Users", "work", "opt"]) + r")/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if homes.search(line)
    ]
    assert not found


def test_the_licence_is_there_and_is_the_one_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:500]


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = subprocess.run(
        [sys.executable, "-c", "import hotset; print(hotset.__version__)"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_that_is_installed_for_us_is_pinned() -> None:
    pins = pinned()
    seen: set[tuple[str, str]] = set()
    waiting = [("hotset", extra) for extra in ("", "dev", "sim", "torch", "onnx")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), part) for part in ("", *needed.extras)]
    installed = {name: metadata.version(name).partition("+")[0] for name, _ in seen if name != "hotset"}
    unpinned = {name: version for name, version in installed.items() if pins.get(name) != version}
    assert not unpinned, f"refresh constraints.txt as its head says: {unpinned}"


def test_pins_name_no_index_and_no_local_build() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)


# Imported for functions with images in their signature only; such functions require Pillow themselves.
WITH_PILLOW = {ROOT / "src" / "hotset" / "functions" / "images.py"}


def third_party_imports(folder: Path) -> set[str]:
    """Packages that a folder's modules import at their top, so that they cannot be imported without."""
    names: set[str] = set()
    for path in set(folder.rglob("*.py")) - WITH_PILLOW:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"hotset"}


@pytest.mark.parametrize("folder", ["node/worker", "functions"])
def test_a_gpu_process_needs_only_what_every_environment_gets(folder: str) -> None:
    assert third_party_imports(ROOT / "src" / "hotset" / folder) <= set(WORKER_PACKAGES)


@pytest.mark.parametrize("name", [*POLICIES, *EVICTIONS])
def test_every_policy_is_documented(name: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert any(f"`{name}`" in page.read_text() for page in pages), f"explain `{name}` in docs/"


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_the_commands_of_a_document_work(document: str, tmp_path: Path) -> None:
    ran = run_document((ROOT / document).read_text(), tmp_path)
    assert ran or document != "README.md", "mark the README's commands with <!-- test -->"


DOCUMENT = """
<!-- test: file pkg/hello.py -->
```python
print("hello")
```
<!-- test -->
```console
$ python pkg/hello.py
hello
$ python -m http.server 8080 --bind 127.0.0.1 &
$ python -c "from urllib.request import urlopen; \\
    print(urlopen('http://127.0.0.1:8080/pkg').status, 'after', 0.25, 's')"
200 after ... s
```
```console
$ exit 1
```
"""


def test_a_documents_commands_are_really_run(tmp_path: Path) -> None:
    assert run_document(DOCUMENT, tmp_path) == 3
    assert (tmp_path / "pkg" / "hello.py").read_text() == 'print("hello")\n'


@pytest.mark.parametrize(
    ("command", "shown", "problem"),
    [
        ("echo one", "two\n", r"(?s)`echo one` printed\none\n.*and not\ntwo"),
        ("false", "", r"`false` ended with status 1"),
        ("false &", "", r"`false &` ended with status 1"),
        ("sleep 60", "", r"`sleep 60` took longer than 0.2 s"),
    ],
)
def test_a_document_that_is_wrong_is_found_out(tmp_path: Path, command: str, shown: str, problem: str) -> None:
    text = f"<!-- test -->\n```console\n$ {command}\n{shown}```\n"
    with pytest.raises(AssertionError, match=problem):
        run_document(text, tmp_path, 0.2 if "sleep" in command else 60.0)
