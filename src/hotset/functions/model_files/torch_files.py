"""TorchScript, torch.export (.pt2), and, where they are trusted, pickled modules; safetensors with a class."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import json
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hotset.errors import FunctionError, InputError
from hotset.functions.model_files.adapter import Adapter
from hotset.functions.v2_types import OUTPUT, UNDECLARED, TensorMetadata


class _TorchFile(Adapter):
    """A file whose content torch calls as a module."""

    torch = True
    typed = False

    @property
    def outputs(self) -> Sequence[TensorMetadata]:
        return [_untyped(OUTPUT)]

    @functools.cached_property
    def _module(self) -> Any:
        """The module on the CPU."""
        raise NotImplementedError

    def load(self, device: str) -> None:
        self._device = device
        self._run = self._module.to(device).eval()

    def run(self, tensors: Sequence[Any]) -> Sequence[Any]:
        import torch

        with torch.inference_mode():
            result = self._run(*(each.to(self._device) for each in tensors))
        if isinstance(result, dict):
            return list(result.values())
        return list(result) if isinstance(result, tuple | list) else [result]


class TorchScriptFile(_TorchFile):
    """``torch.jit.save``. Its file names the arguments and how many results there are, no datatypes and no shapes."""

    platform = "pytorch_libtorch"

    @functools.cached_property
    def _module(self) -> Any:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(self.path), map_location="cpu")  # type: ignore[no-untyped-call]

    @property
    def inputs(self) -> Sequence[TensorMetadata]:
        arguments = self._module.forward.schema.arguments[1:]
        for each in arguments:
            if str(each.type) not in ("Tensor", "Optional[Tensor]"):
                raise FunctionError(f"{self.path.name}: forward takes {each.name}: {each.type}; make it take tensors")
        return [_untyped(each.name) for each in arguments]

    @property
    def outputs(self) -> Sequence[TensorMetadata]:
        (returned,) = self._module.forward.schema.returns
        if returned.type.kind() == "TupleType":
            return [_untyped(f"{OUTPUT}_{index}") for index in range(len(returned.type.elements()))]
        if returned.type.kind() != "TensorType":
            raise FunctionError(f"{self.path.name}: forward returns {returned.type}; make it return tensors")
        return [_untyped(OUTPUT)]


class ExportedFile(_TorchFile):
    """``torch.export.save`` (.pt2). Parts of such an archive may be pickles; those are refused before it is opened."""

    platform = "pytorch_export"
    typed = True

    def __init__(self, path: Path, *, trust_pickle: bool = False) -> None:
        super().__init__(path)
        self._trust_pickle = trust_pickle

    @functools.cached_property
    def _program(self) -> Any:
        import torch

        if not self._trust_pickle:
            _refuse_pickles_inside(self.path)
        return torch.export.load(str(self.path))

    @functools.cached_property
    def _module(self) -> Any:
        return self._program.module()

    @property
    def inputs(self) -> Sequence[TensorMetadata]:
        return self._described(self._program.graph_signature.user_inputs, "")

    @property
    def outputs(self) -> Sequence[TensorMetadata]:
        return self._described(self._program.graph_signature.user_outputs, OUTPUT)

    def load(self, device: str) -> None:
        from torch.export.passes import move_to_device_pass

        self._device = device
        program = self._program if device == "cpu" else move_to_device_pass(self._program, device)
        self._run = program.module()

    def run(self, tensors: Sequence[Any]) -> Sequence[Any]:
        try:
            return super().run(tensors)
        except (AssertionError, RuntimeError) as error:
            # The guards of an exported program: what it was not exported for.
            if "Guard failed" in str(error) or isinstance(error, AssertionError):
                raise InputError("", str(error).strip().partition("\n")[0][:500]) from None
            raise

    def _described(self, names: Sequence[Any], prefix: str) -> list[TensorMetadata]:
        values = {node.name: node.meta.get("val") for node in self._program.graph.nodes}
        described = []
        for index, name in enumerate(names):
            value: Any = values.get(name) if isinstance(name, str) else None
            if not hasattr(value, "dtype"):
                raise FunctionError(f"{self.path.name}: {name} is no tensor; export a forward of tensors only")
            shown = name if not prefix else prefix if len(names) == 1 else f"{prefix}_{index}"
            shape = [length if isinstance(length, int) else -1 for length in value.shape]
            described.append(TensorMetadata(name=shown, datatype=torch_datatype(value.dtype), shape=shape))
        return described


class PickledFile(_TorchFile):
    """A whole module saved with ``torch.save``: loading it runs whatever code it holds, hence only where trusted."""

    platform = "pytorch_module"

    @functools.cached_property
    def _module(self) -> Any:
        import torch

        module = torch.load(str(self.path), map_location="cpu", weights_only=False)
        if not isinstance(module, torch.nn.Module):
            raise FunctionError(
                f"{self.path.name} holds a {type(module).__name__}, not a module: save its tensors as .safetensors and "
                f"deploy them with their class (--module FILE.py:CLASS)"
            )
        return module

    @property
    def inputs(self) -> Sequence[TensorMetadata]:
        return _forward_arguments(self._module)


class SafetensorsFile(_TorchFile):
    """Weights, and the class they belong to: an ``nn.Module`` that is made without arguments."""

    platform = "pytorch_module"

    def __init__(self, path: Path, *, module: str) -> None:
        """``module``: ``FILE.py:CLASS``, beside the weights."""
        super().__init__(path)
        self._source = module

    @functools.cached_property
    def _module(self) -> Any:
        from safetensors.torch import load_file

        module = _class_of(self.path.parent, self._source)()
        try:
            module.load_state_dict(load_file(str(self.path)), strict=True)
        except RuntimeError as error:
            raise FunctionError(f"{self.path.name} does not fit {self._source}: {error}") from None
        return module

    @property
    def inputs(self) -> Sequence[TensorMetadata]:
        return _forward_arguments(self._module)

    def beside(self) -> Sequence[str]:
        return (self._source.partition(":")[0],)


def torch_datatype(dtype: Any) -> str:
    """torch's dtype as a v2 datatype; raises ``FunctionError`` for one that v2 does not have."""
    import torch

    if dtype is torch.bfloat16:
        return "BF16"
    names = {"bool": "BOOL", "half": "FP16", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
    name = str(dtype).removeprefix("torch.")
    datatype = names.get(name) or (name.upper() if name.strip("0123456789") in ("int", "uint") else None)
    if datatype is None:
        raise FunctionError(f"{dtype} is no datatype of the v2 protocol: cast it inside the model")
    return datatype


def _untyped(name: str) -> TensorMetadata:
    return TensorMetadata(name=name, datatype=UNDECLARED, shape=(-1,))


def _forward_arguments(module: Any) -> list[TensorMetadata]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [_untyped(each.name) for each in parameters if each.default is each.empty]


def _class_of(folder: Path, source: str) -> Any:
    file, _, name = source.partition(":")
    path = folder / file
    if not name or path.name != file or path.suffix != ".py" or not path.is_file():
        raise FunctionError(f"module {source!r}: name a file beside the weights and its class, such as net.py:Net")
    spec = importlib.util.spec_from_file_location(f"hotset_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    found = getattr(loaded, name, None)
    if not inspect.isclass(found):
        raise FunctionError(f"{file} has no class {name}")
    return found


def _refuse_pickles_inside(path: Path) -> None:
    """Raise ``FunctionError`` when opening the archive would unpickle anything but plain tensors."""
    import torch

    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise FunctionError(f"{path.name} holds two entries of one name: save it again with torch.export.save")
        for name in names:
            if name.endswith("_config.json") and "/data/" in name:
                listed = json.loads(archive.read(name)).get("config", {})
                if not all(_is_plain_tensor(each) for each in listed.values()):
                    raise pickle_refusal(path)
            elif "/data/sample_inputs/" in name:
                # torch falls back to full unpickling when its safe loader gives up, so that must not happen.
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True, map_location="cpu")
                except Exception:  # noqa: BLE001 - it raises whatever a broken or hostile file makes it raise
                    raise pickle_refusal(path) from None


def _is_plain_tensor(entry: Any) -> bool:
    """Whether a weight or constant is raw bytes, as their file names and flags tell torch's reader."""
    return entry.get("use_pickle") is False and str(entry.get("path_name")).startswith(("weight_", "tensor_"))


def pickle_refusal(path: Path) -> FunctionError:
    return FunctionError(
        f"{path.name} is, or holds, a Python pickle, which runs the code it contains when it is opened: export the "
        f"model (torch.export.save, torch.jit.save, ONNX or safetensors), or, if you made the file, say --trust-pickle"
    )
