"""GPU memory a deployment asks for, by every way that reaches the server; the first that says something counts:

    1  ``hotset.gpu_memory`` of the deployment (REST, ``hotset deploy --gpu-memory``)
    2  annotation ``hotset.gpu-memory``, then the label of that name
    3  annotation ``com.openfaas.profile``: a profile of the server's configuration
    4  constraint ``gpu-memory=SIZE``
    5  ``limits``, then ``requests``, ``nvidia.com/gpu: "1"``: a GPU, of an amount to be learned

Beside them the constraint ``gpu=KIND`` says on which kind of GPU, and ``gpu=1`` the same as 5. faas-cli drops 1 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import msgspec

from hotset.errors import ConfigurationError
from hotset.functions.units import parse_bytes
from hotset.gateway.openfaas.types import FunctionDeployment

GPU_MEMORY = "hotset.gpu-memory"
PROFILE = "com.openfaas.profile"
NVIDIA = "nvidia.com/gpu"

_CONSTRAINT = re.compile(r"\s*([\w.\-/]+)\s*={1,2}\s*(.+?)\s*")


class GpuProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A profile of the server's configuration: what deployments that name it get."""

    gpu_memory: str | int | None = None
    """None: a GPU, of an amount to be learned."""
    gpu: str | None = None
    """Kind of GPU, as ``gpu=KIND``."""


class GpuRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment asks for."""

    wanted: bool | None = None
    """None: it does not say; the function's code does."""
    memory: str | int | None = None
    source: str | None = None
    """Which way of saying it counted."""


def read_gpu_request(
    wanted: FunctionDeployment, profiles: Mapping[str, GpuProfile], kinds: Collection[str]
) -> GpuRequest:
    """``kinds``: of the server's GPUs. Raises ``ConfigurationError`` for what cannot be honoured."""
    constraints = _constraints(wanted.constraints or ())
    profile, profile_name = _profile(wanted, profiles)
    for kind in (constraints.get("gpu", ""), profile.gpu or ""):
        if kind and not kind.isdigit():
            _check_kind(kind, kinds)
    limited = _limited(wanted, constraints.get("gpu", ""))
    labels, annotations = wanted.labels or {}, wanted.annotations or {}
    said = (
        (wanted.hotset.gpu_memory, "hotset.gpu_memory"),
        (annotations.get(GPU_MEMORY), f"annotation {GPU_MEMORY}"),
        (labels.get(GPU_MEMORY), f"label {GPU_MEMORY}"),
        (profile.gpu_memory, f"profile {profile_name}"),
        (constraints.get("gpu-memory"), "constraint gpu-memory"),
    )
    for memory, source in said:
        if memory is not None:
            if parse_bytes(memory, source) == 0:
                raise ConfigurationError(f"{source} is 0: leave it out for a function that needs no GPU")
            return GpuRequest(wanted=True, memory=memory, source=source)
    if profile_name:
        return GpuRequest(wanted=True, source=f"profile {profile_name}")
    return limited


def _profile(wanted: FunctionDeployment, profiles: Mapping[str, GpuProfile]) -> tuple[GpuProfile, str]:
    """The first profile that is named, and its name; both are empty when none is."""
    names = [name.strip() for name in (wanted.annotations or {}).get(PROFILE, "").split(",") if name.strip()]
    for name in names:
        if name not in profiles:
            known = ", ".join(sorted(profiles)) or "none"
            raise ConfigurationError(f"there is no profile {name[:60]!r}; the server's configuration has: {known}")
    return (profiles[names[0]], names[0]) if names else (GpuProfile(), "")


def _constraints(given: Collection[str]) -> dict[str, str]:
    """Those about GPUs; all others are kept and mean nothing here."""
    found = (_CONSTRAINT.fullmatch(each) for each in given if len(each) < 200)
    pairs = {match[1].replace("_", "-"): match[2] for match in found if match is not None}
    return {key: value for key, value in pairs.items() if key in ("gpu", "gpu-memory")}


def _limited(wanted: FunctionDeployment, constraint: str) -> GpuRequest:
    for resources, where in ((wanted.limits, "limits"), (wanted.requests, "requests")):
        if resources is None:
            continue
        for other in (resources.amd_gpu, resources.intel_gpu):
            if other not in (None, "", "0"):
                raise ConfigurationError(f"{where}: this server runs functions on NVIDIA GPUs: ask for {NVIDIA}")
        if resources.nvidia_gpu:
            return _number_of_gpus(resources.nvidia_gpu, f"{where} {NVIDIA}")
    if constraint.isdigit():
        return _number_of_gpus(constraint, "constraint gpu")
    return GpuRequest(wanted=True, source="constraint gpu") if constraint else GpuRequest()


def _number_of_gpus(text: str, source: str) -> GpuRequest:
    if text not in ("0", "1"):
        raise ConfigurationError(
            f"{source} is {text[:40]!r}: a function's model is on one GPU, which it may share: write 1, and its memory "
            f"as annotation {GPU_MEMORY}"
        )
    return GpuRequest(wanted=text == "1", source=source)


def _check_kind(kind: str, kinds: Collection[str]) -> None:
    matching = [each for each in kinds if kind.lower() in each.lower()]
    have = ", ".join(sorted(kinds)) or "none"
    if not matching:
        raise ConfigurationError(f"there is no GPU of the kind {kind[:40]!r} here; the server has: {have}")
    if len(matching) < len(kinds):
        raise ConfigurationError(
            f"gpu={kind[:40]}: the server has GPUs of several kinds ({have}) and places models on any of them: run one "
            f"server for each kind"
        )
