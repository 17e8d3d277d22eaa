"""A model repository: a directory that says which models to serve, in the layout that Triton users have.

    REPOSITORY/NAME/config.pbtxt or model.yaml      optional: how it is served
    REPOSITORY/NAME/VERSION/model.onnx              or model.pt, model.pt2, model.safetensors; VERSION is a number

``scan`` reads it all and touches nothing. A model that cannot be served as it says is reported with the reason and the
others are not affected. Files are served from where they stand; a changed file is a changed ``fingerprint``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from hotset.errors import ConfigurationError, HotsetError
from hotset.functions.model_files import FileSettings
from hotset.store.model_config import ModelSettings, no_settings, read_pbtxt, read_yaml

MODEL_FILES = ("model.onnx", "model.pt", "model.pt2", "model.safetensors")
PBTXT = "config.pbtxt"
YAML = "model.yaml"
MAX_CONFIG_BYTES = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version of one model, ready to be served."""

    version: str
    file: Path
    settings: FileSettings
    fingerprint: str
    """Changes when any of its files, or its configuration, does. Hexadecimal."""


class ModelFolder(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the repository."""

    name: str
    versions: tuple[ModelVersion, ...] = ()
    """Those that its version policy wants, the newest first: it is what calls without a version get."""
    problem: str | None = None
    """Why it cannot be served; then there are no versions."""


def scan(repository: Path) -> list[ModelFolder]:
    """Every model of the directory, by name. Names that begin with a dot are not looked at.

    Raises ``ConfigurationError`` when the directory itself cannot be read.
    """
    try:
        folders = sorted(each for each in repository.iterdir() if not each.name.startswith(".") and each.is_dir())
    except OSError as error:
        raise ConfigurationError(f"the model repository {repository} cannot be read: {error.strerror}") from None
    return [read_model(each) for each in folders]


def read_model(folder: Path) -> ModelFolder:
    """One model of the repository; what is wrong with it is its ``problem``."""
    try:
        return ModelFolder(name=folder.name, versions=tuple(_read_versions(folder)))
    except HotsetError as error:
        return ModelFolder(name=folder.name, problem=str(error))
    except OSError as error:
        return ModelFolder(name=folder.name, problem=f"{error.filename or folder.name}: {error.strerror}")


def _read_versions(folder: Path) -> Iterable[ModelVersion]:
    if not _NAME.fullmatch(folder.name):
        raise ConfigurationError(f"{folder.name!r} is no model name: use up to 63 letters, digits, '.', '_' and '-'")
    settings, configuration = _read_settings(folder)
    inside = [each.name for each in folder.iterdir() if each.is_dir() and each.name.isdecimal()]
    numbers = sorted((int(name) for name in inside if name == str(int(name))), reverse=True)
    if not numbers:
        raise ConfigurationError(f"it has no version: put the model in {folder.name}/1/{MODEL_FILES[0]}")
    chosen = settings.policy.choose(numbers)
    if not chosen:
        raise ConfigurationError(f"its version_policy wants none of the versions that are there: {numbers}")
    for number in chosen:
        file = _model_file(folder / str(number), settings)
        yield ModelVersion(
            version=str(number),
            file=file,
            settings=settings.file_settings(folder, file),
            fingerprint=_fingerprint(folder, file.parent, configuration),
        )


def _read_settings(folder: Path) -> tuple[ModelSettings, bytes]:
    """What the model's configuration says, and its bytes."""
    found = [each for each in (folder / PBTXT, folder / YAML) if each.is_file()]
    if not found:
        return no_settings(), b""
    if len(found) > 1:
        raise ConfigurationError(f"it has both {PBTXT} and {YAML}: keep one of them")
    if found[0].stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigurationError(f"{found[0].name} is larger than {MAX_CONFIG_BYTES} bytes")
    content = found[0].read_bytes()
    read = read_pbtxt if found[0].name == PBTXT else read_yaml
    return read(content, folder.name), content


def _model_file(folder: Path, settings: ModelSettings) -> Path:
    if settings.file_name:
        names: tuple[str, ...] = (settings.file_name,)
    else:
        names = MODEL_FILES
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        where = f"{folder.parent.name}/{folder.name}"
        if not found:
            raise ConfigurationError(f"{where} holds no {' or '.join(names)}")
        raise ConfigurationError(
            f"{where} holds {' and '.join(each.name for each in found)}: name one with default_model_filename"
        )
    return found[0]


def _fingerprint(folder: Path, version: Path, configuration: bytes) -> str:
    """Of names, sizes and times of modification: reading gigabytes of weights at every look would be too much."""
    digest = hashlib.sha256(configuration)
    beside = [each for each in folder.iterdir() if each.is_file()]
    for path in sorted([*beside, *(each for each in version.rglob("*") if each.is_file())]):
        found = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()
