"""OpenFaaS's stack files, as far as they say what to deploy: the same file serves faas-cli and ``hotset deploy -f``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from hotset.errors import ConfigurationError

Scalar = str | int | float | bool | None

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class StackFunction(msgspec.Struct, frozen=True, kw_only=True):
    """One entry under ``functions``; what else it says is for building images."""

    image: str = ""
    handler: str = ""
    """Folder, or file, that holds its code, relative to the stack file."""
    fprocess: str | None = None
    namespace: str = ""
    environment: Mapping[str, Scalar] | None = None
    environment_file: tuple[str, ...] | None = None
    labels: Mapping[str, Scalar] | None = None
    annotations: Mapping[str, Scalar] | None = None
    constraints: tuple[str, ...] | None = None
    secrets: tuple[str, ...] | None = None
    limits: Mapping[str, Scalar] | None = None
    requests: Mapping[str, Scalar] | None = None
    readonly_root_filesystem: bool = False


class StackProvider(msgspec.Struct, frozen=True, kw_only=True):
    name: str = "openfaas"
    gateway: str | None = None


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    functions: Mapping[str, StackFunction]
    provider: StackProvider = StackProvider()
    version: Scalar = "1.0"


def read_stack(path: Path, env: Mapping[str, str] = os.environ) -> Stack:
    """``${NAME}`` and ``${NAME:-default}`` are replaced first. Raises ``ConfigurationError`` that names the place."""
    try:
        text = _VARIABLE.sub(lambda found: env.get(found[1], found[2] or ""), path.read_text(encoding="utf-8"))
        return msgspec.convert(yaml.safe_load(text), Stack)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path} is no stack file: {error}") from None


def deployment(name: str, function: StackFunction, folder: Path) -> dict[str, Any]:
    """The request body for one function. ``folder``: what its ``environment_file`` paths are relative to."""
    said = {
        "service": name,
        "image": function.image,
        "namespace": function.namespace,
        "envProcess": function.fprocess,
        "envVars": {**_environment_files(function.environment_file or (), folder), **_texts(function.environment)},
        "labels": _texts(function.labels),
        "annotations": _texts(function.annotations),
        "constraints": function.constraints,
        "secrets": function.secrets,
        "limits": _texts(function.limits),
        "requests": _texts(function.requests),
        "readOnlyRootFilesystem": function.readonly_root_filesystem,
    }
    return {key: value for key, value in said.items() if value}


def _texts(values: Mapping[str, Scalar] | None) -> dict[str, str]:
    """YAML's booleans and numbers as the texts they stand for."""
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in (values or {}).items()}


def _environment_files(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    variables: dict[str, str] = {}
    for name in names:
        try:
            content = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            variables |= _texts(msgspec.convert((content or {}).get("environment", {}), dict[str, Scalar]))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, msgspec.ValidationError) as error:
            raise ConfigurationError(f"environment_file {folder / name} cannot be read: {error}") from None
    return variables
