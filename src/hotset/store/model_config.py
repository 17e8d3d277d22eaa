"""A model's configuration, config.pbtxt or model.yaml: honoured, or refused with what to change; never ignored.

Both have the fields of ``ModelConfig`` in open_inference.proto, the part of Triton's model configuration that means
something here. model.yaml may have a section ``hotset`` besides: ``gpu_memory``, ``timeout``, ``load_timeout``,
``module`` (the class of safetensors) and ``trust_pickle``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec

from hotset.errors import ConfigurationError
from hotset.functions.model_files import FileSettings
from hotset.functions.model_files.declared import Declared

_BACKENDS = {
    ".onnx": ("onnxruntime", "onnxruntime_onnx"),
    ".pt": ("pytorch", "pytorch_libtorch"),
    ".pt2": ("pytorch", "pytorch_export"),
    ".safetensors": ("pytorch", "pytorch_module"),
}
"""Model file -> the backend or platform that a configuration may name for it."""
LONGEST_DELAY_S = 60
"""That a request may be held back for a batch."""
_ANY_BACKEND = ("", "hotset")
_NEEDS = "pip install 'hotset[repository]'"


class PolicyKind(Enum):
    LATEST = "latest"
    ALL = "all"
    SPECIFIC = "specific"


class VersionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the versions on disk are served."""

    kind: PolicyKind = PolicyKind.LATEST
    count: int = 1
    """Of the latest."""
    wanted: tuple[int, ...] = ()
    """The specific ones."""

    def choose(self, numbers: Sequence[int]) -> list[int]:
        """Of ``numbers``, newest first, those that are served."""
        match self.kind:
            case PolicyKind.LATEST:
                return list(numbers[: self.count])
            case PolicyKind.ALL:
                return list(numbers)
            case PolicyKind.SPECIFIC:
                return [number for number in numbers if number in self.wanted]


class OwnSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section ``hotset`` of a model.yaml."""

    gpu_memory: str | int | None = None
    timeout: str | float | None = None
    load_timeout: str | float | None = None
    module: str | None = None
    trust_pickle: bool = False


class Label(msgspec.Struct, frozen=True):
    """Where an output's class names are."""

    output: str
    file: str


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration that was read and can be honoured."""

    policy: VersionPolicy = VersionPolicy()
    backend: str = ""
    file_name: str = ""
    """The model's file in each version; empty: the usual names."""
    max_rows: int = 0
    join: bool = False
    join_wait_s: float = 0.0
    cpu: bool = False
    inputs: tuple[Declared, ...] = ()
    outputs: tuple[Declared, ...] = ()
    labels: tuple[Label, ...] = ()
    own: OwnSettings = OwnSettings()

    def file_settings(self, folder: Path, file: Path) -> FileSettings:
        """How one version's file is served; raises ``ConfigurationError``."""
        allowed = _BACKENDS.get(file.suffix, ())
        if self.backend not in (*_ANY_BACKEND, *allowed):
            raise ConfigurationError(
                f"backend {self.backend!r} does not serve {file.name}: leave it out, or say {' or '.join(allowed)}"
            )
        names = {each.output: _read_labels(folder, each.file) for each in self.labels}
        return FileSettings(
            inputs=self.inputs,
            outputs=tuple(msgspec.structs.replace(each, labels=names.get(each.name, ())) for each in self.outputs),
            max_rows=self.max_rows,
            join=self.join,
            join_wait_s=self.join_wait_s,
            cpu=self.cpu,
            gpu_memory=self.own.gpu_memory,
            timeout=self.own.timeout,
            load_timeout=self.own.load_timeout,
            module=self.own.module,
            trust_pickle=self.own.trust_pickle,
        )


def no_settings() -> ModelSettings:
    """A model without a configuration: its latest version, as its file says."""
    return ModelSettings()


def read_pbtxt(content: bytes, name: str) -> ModelSettings:
    """Settings of a config.pbtxt; raises ``ConfigurationError`` for what cannot be honoured, by its name."""
    try:
        from google.protobuf import text_format  # type: ignore[import-untyped]

        from hotset.protocol.messages import message_class
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"config.pbtxt cannot be read without {error.name}: {_NEEDS}") from None
    try:
        config = text_format.Parse(content.decode(), message_class("ModelConfig")())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ConfigurationError(_refused("config.pbtxt", error)) from None
    return _settings(config, name, OwnSettings())


def read_yaml(content: bytes, name: str) -> ModelSettings:
    """Settings of a model.yaml; raises ``ConfigurationError`` for what cannot be honoured, by its name."""
    try:
        import yaml
        from google.protobuf import json_format

        from hotset.protocol.messages import message_class
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"model.yaml cannot be read without {error.name}: {_NEEDS}") from None
    try:
        said = yaml.safe_load(content)
        if not isinstance(said, dict):
            raise ValueError("it must be a mapping of settings")
        own = msgspec.convert(said.pop("hotset", {}), OwnSettings)
        config = json_format.ParseDict(said, message_class("ModelConfig")())
    except (yaml.YAMLError, json_format.ParseError, msgspec.ValidationError, ValueError) as error:
        raise ConfigurationError(_refused("model.yaml", error)) from None
    return _settings(config, name, own)


def _refused(file: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:500]
    return f"{file} says what cannot be honoured here, or cannot be read: {reason}"


def _settings(config: Any, name: str, own: OwnSettings) -> ModelSettings:
    if config.name not in ("", name):
        raise ConfigurationError(f"its configuration is named {config.name!r}, its folder {name!r}: make them agree")
    if config.backend and config.platform:
        raise ConfigurationError("its configuration has both backend and platform: keep one of them")
    if config.max_batch_size < 0:
        raise ConfigurationError("max_batch_size must be 0 or more")
    if config.model_transaction_policy.decoupled:
        raise ConfigurationError("a model file gives one response to a request: leave out decoupled")
    file_name = config.default_model_filename
    if file_name and (Path(file_name).name != file_name or Path(file_name).suffix not in _BACKENDS):
        raise ConfigurationError(f"default_model_filename {file_name!r} must name a file of {', '.join(_BACKENDS)}")
    join, cpu = _joins(config), _on_cpu(config)
    if join and cpu:
        raise ConfigurationError("on the CPU requests run one by one: leave out dynamic_batching, or KIND_CPU")
    return ModelSettings(
        policy=_policy(config),
        backend=config.backend or config.platform,
        file_name=file_name,
        max_rows=config.max_batch_size,
        join=join,
        join_wait_s=config.dynamic_batching.max_queue_delay_microseconds / 1e6,
        cpu=cpu,
        inputs=tuple(_declared(each) for each in config.input),
        outputs=tuple(_declared(each) for each in config.output),
        labels=tuple(Label(each.name, each.label_filename) for each in config.output if each.label_filename),
        own=own,
    )


def _policy(config: Any) -> VersionPolicy:
    choice = config.version_policy.WhichOneof("policy_choice")
    if choice == "all":
        return VersionPolicy(kind=PolicyKind.ALL)
    if choice == "specific":
        wanted = tuple(config.version_policy.specific.versions)
        return VersionPolicy(kind=PolicyKind.SPECIFIC, wanted=wanted)
    return VersionPolicy(count=max(1, config.version_policy.latest.num_versions))


def _joins(config: Any) -> bool:
    if not config.HasField("dynamic_batching"):
        return False
    batching = config.dynamic_batching
    if config.max_batch_size < 2:
        raise ConfigurationError("dynamic_batching needs a max_batch_size of at least 2")
    if any(size != config.max_batch_size for size in batching.preferred_batch_size):
        raise ConfigurationError(
            "dynamic_batching fills up to max_batch_size: leave out preferred_batch_size, or make it the same"
        )
    if batching.max_queue_delay_microseconds > LONGEST_DELAY_S * 1e6:
        raise ConfigurationError(f"max_queue_delay_microseconds must be at most {LONGEST_DELAY_S} seconds")
    if batching.preserve_ordering:
        raise ConfigurationError("requests are answered as soon as they are done: leave out preserve_ordering")
    return True


def _on_cpu(config: Any) -> bool:
    if not config.instance_group:
        return False
    group = config.instance_group[0]
    if len(config.instance_group) > 1 or group.count > 1:
        raise ConfigurationError("instance_group: a model has one instance per GPU, started on demand: leave out count")
    if group.gpus:
        raise ConfigurationError("instance_group: the scheduler chooses the GPU: leave out gpus")
    kind = group.DESCRIPTOR.enum_types_by_name["Kind"].values_by_number[group.kind].name
    if kind == "KIND_MODEL":
        raise ConfigurationError("instance_group: a model does not choose its device: use KIND_GPU or KIND_CPU")
    return bool(kind == "KIND_CPU")


def _declared(tensor: Any) -> Declared:
    if getattr(tensor, "optional", False):
        raise ConfigurationError(f"input {tensor.name}: a model file's inputs cannot be optional")
    if not tensor.name or not tensor.data_type:
        raise ConfigurationError("every input and output of a configuration needs a name and a data_type")
    kind = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    datatype = "BYTES" if kind == "TYPE_STRING" else kind.removeprefix("TYPE_")
    return Declared(name=tensor.name, datatype=datatype, shape=tuple(tensor.dims))


def _read_labels(folder: Path, file: str) -> tuple[str, ...]:
    if Path(file).name != file or not (folder / file).is_file():
        raise ConfigurationError(f"label_filename {file!r} is no file beside the configuration")
    return tuple((folder / file).read_text(encoding="utf-8").splitlines())
