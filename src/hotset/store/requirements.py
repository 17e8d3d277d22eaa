"""What a function says it imports: a ``requirements.txt``, or a script header in its own file (PEP 723).

Both are read to the same normal form, so that two spellings of the same requirements share one environment. Only
requirements are accepted: the installer's options (indexes, paths, flags) are the operator's, never a caller's.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import tomllib
from collections.abc import Iterable
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from hotset.errors import BundleError

REQUIREMENTS_FILE = "requirements.txt"
MAX_READ_BYTES = 1 << 20
MAX_REQUIREMENTS = 1000

_DOWNLOADS = ("https://", "git+https://")


class Requirements(msgspec.Struct, frozen=True, dict=True):
    """The requirements of one function in normal form; empty: it needs what hotset itself needs, or less."""

    lines: tuple[str, ...] = ()
    """PEP 508, one per package, sorted, those for other platforms left out."""

    @cached_property
    def digest(self) -> str:
        """Names the environment: SHA-256 over the lines, this Python's version and the machine's architecture."""
        place = f"{sys.implementation.name} {platform.python_version()} {sys.platform} {platform.machine()}"
        return hashlib.sha256("\n".join([place, *self.lines]).encode()).hexdigest()


def read_requirements(folder: Path, script: str | None = None) -> Requirements:
    """The requirements of the function in ``folder``, a bundle.

    ``script``: name of the file its entry is in; a PEP 723 header there takes the place of ``requirements.txt``. Raises
    ``BundleError`` naming the file, the line and what to change.
    """
    if script is not None and (header := _script_header(folder / script)) is not None:
        return _from_header(header, script)
    path = folder / REQUIREMENTS_FILE
    if not path.is_file():
        return Requirements()
    return parse_requirements(_read(path).splitlines(), REQUIREMENTS_FILE)


def parse_requirements(lines: Iterable[str], source: str) -> Requirements:
    """Requirements from the lines of a ``requirements.txt``; ``source`` names it in errors."""
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        # As pip reads it: "#" begins a comment at the start of a line or after white space.
        text = f" {line}".split(" #", 1)[0].strip()
        if not text:
            continue
        where = f"{source}, line {number}"
        if text.startswith("-"):
            raise BundleError(
                f"{where}: {text.split()[0]} is an option of the installer; list packages only, and let the server's "
                f"operator configure pip"
            )
        requirement = _parsed(text, where)
        if requirement.marker is None or requirement.marker.evaluate():
            name = canonicalize_name(requirement.name)
            normal = _normal(requirement)
            if found.setdefault(name, normal) != normal:
                raise BundleError(f"{where}: {name} is required twice, differently; keep one line for it")
    if len(found) > MAX_REQUIREMENTS:
        raise BundleError(f"{source}: more than {MAX_REQUIREMENTS} requirements; list only what the function imports")
    return Requirements(tuple(found[name] for name in sorted(found)))


def installed_here(requirements: Requirements) -> bool:
    """Whether this very interpreter satisfies all of them, so that nothing has to be installed."""
    return all(_satisfied(Requirement(line), set()) for line in requirements.lines)


def _satisfied(requirement: Requirement, seen: set[tuple[str, str]]) -> bool:
    """Extras are followed, since an installed package says nothing of its optional parts."""
    if requirement.url is not None:
        return False
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    if not requirement.specifier.contains(distribution.version, prereleases=True):
        return False
    for extra in requirement.extras:
        key = (canonicalize_name(requirement.name), canonicalize_name(extra))
        if key in seen:
            continue
        seen.add(key)
        for line in distribution.requires or ():
            needed = Requirement(line)
            # A requirement whose marker holds for the extra alone is what the extra adds.
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                continue
            if needed.marker.evaluate({"extra": extra}) and not _satisfied(needed, seen):
                return False
    return True


def _parsed(text: str, where: str) -> Requirement:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{where}: {text[:80]!r} is no requirement ({reason}); write it as name==version") from None
    if requirement.url is not None and not requirement.url.startswith(_DOWNLOADS):
        raise BundleError(f"{where}: {requirement.name} comes from {requirement.url[:80]}; only https is accepted")
    return requirement


def _normal(requirement: Requirement) -> str:
    extras = ",".join(sorted(canonicalize_name(extra) for extra in requirement.extras))
    name = canonicalize_name(requirement.name) + (f"[{extras}]" if extras else "")
    return f"{name} @ {requirement.url}" if requirement.url else f"{name}{requirement.specifier}"


def _script_header(path: Path) -> str | None:
    """The TOML text of a file's ``# /// script`` block, or None when it has none."""
    if path.suffix != ".py" or not path.is_file():
        return None
    block: list[str] | None = None
    found: str | None = None
    for line in _read(path).splitlines():
        if block is None:
            block = [] if line == "# /// script" else None
        elif line == "# ///":
            if found is not None:
                raise BundleError(f"{path.name} has two '# /// script' blocks; keep one")
            found, block = "\n".join(block), None
        elif line == "#" or line.startswith("# "):
            block.append(line[2:])
        else:
            break
    if block is not None:
        raise BundleError(f"{path.name}: its '# /// script' block has no end; close it with a line '# ///'")
    return found


def _from_header(header: str, script: str) -> Requirements:
    try:
        content: dict[str, Any] = tomllib.loads(header)
    except tomllib.TOMLDecodeError as error:
        raise BundleError(f"{script}: its '# /// script' block is not TOML ({error}); correct it") from None
    wanted = content.get("requires-python", "")
    lines = content.get("dependencies", [])
    if not isinstance(wanted, str) or not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise BundleError(
            f"{script}: in its '# /// script' block, requires-python is a text, dependencies a list of texts"
        )
    try:
        fits = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    except InvalidSpecifier:
        raise BundleError(f"{script}: requires-python = {wanted!r} is no version range; write it as '>=3.11'") from None
    if not fits:
        raise BundleError(
            f"{script} requires Python {wanted} and this server runs {platform.python_version()}; "
            f"relax requires-python or start the server with another Python"
        )
    return parse_requirements(lines, f"{script}, dependencies")


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_READ_BYTES + 1)
    if len(content) > MAX_READ_BYTES:
        raise BundleError(f"{path.name} is larger than {MAX_READ_BYTES >> 20} MiB; split it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BundleError(f"{path.name} is not UTF-8 text; save it as UTF-8") from None
