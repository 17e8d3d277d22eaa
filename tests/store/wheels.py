"""Packages for installation tests, made on the spot: no index, no network."""

from __future__ import annotations

import zipfile
from importlib import metadata
from pathlib import Path


def make_wheel(folder: Path, name: str, code: str, requires: tuple[str, ...] = ()) -> None:
    """A wheel of version 1.0 with one module."""
    info = f"{name}-1.0.dist-info"
    about = "".join(
        [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    )
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def repack(folder: Path, name: str) -> None:
    """A wheel of a package that is installed here, from its own list of files."""
    distribution = metadata.distribution(name)
    about = distribution.read_text("WHEEL") or ""
    tag = next(line.removeprefix("Tag: ") for line in about.splitlines() if line.startswith("Tag: "))
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-{tag}.whl", "w") as wheel:
        for file in distribution.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(file.locate(), str(file))
