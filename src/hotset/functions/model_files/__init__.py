"""Model files as functions: no code to write, inputs and outputs are read from the file.

``model_file("resnet.onnx")`` gives a class like one a user would write, with ``load`` and ``predict`` and options, so
deployment, scheduling, HTTP and the v2 protocol need not know that there is no user behind it.
"""

from __future__ import annotations

from hotset.functions.model_files.formats import SUFFIXES
from hotset.functions.model_files.function import FileSettings, model_file, settings_from, source_of

__all__ = ["SUFFIXES", "FileSettings", "model_file", "settings_from", "source_of"]
