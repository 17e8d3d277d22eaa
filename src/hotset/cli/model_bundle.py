"""A model file as a folder to deploy: the file, what it needs beside it, and the few lines that serve it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hotset.errors import ConfigurationError
from hotset.functions.model_files import FileSettings, source_of
from hotset.functions.model_files.formats import open_file

ENTRY = "hotset_model:Model"


@contextmanager
def model_folder(model: Path, settings: FileSettings) -> Iterator[Path]:
    """A temporary folder that ``make_bundle`` takes. Raises ``FunctionError`` for a file that cannot be served."""
    adapter = open_file(model, module=settings.module, trust_pickle=settings.trust_pickle)
    needed = [model.name, *adapter.beside()]
    if (model.parent / "requirements.txt").is_file():
        needed.append("requirements.txt")
    with tempfile.TemporaryDirectory(prefix="hotset-") as made:
        folder = Path(made)
        for name in needed:
            source = model.parent / name
            if not source.is_file():
                raise ConfigurationError(f"{model.name} needs {name} beside it, which is not there")
            _place(source.resolve(), folder / name)
        (folder / f"{ENTRY.partition(':')[0]}.py").write_text(source_of(model.name, settings), encoding="utf-8")
        yield folder


def _place(source: Path, target: Path) -> None:
    """The same file under another name where the disk allows it: weights are large."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
