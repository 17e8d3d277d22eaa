"""Functions that tell what process they are in."""

from __future__ import annotations

import os
import random
import sys

import hotset


@hotset.function
class Forked:
    """Answers questions about its process."""

    def load(self, device: str) -> None:
        for name in filter(None, os.environ.get("IMPORTS", "").split(",")):
            __import__(name)

    def predict(self, question: str) -> str:
        if question == "parent":
            return str(os.getppid())
        if question == "random":
            return str(random.random())
        if question == "opened":
            return ",".join(getattr(sys.modules.get("fake_driver"), "opened", ()))
        if question == "leave":
            os._exit(3)
        if question.startswith("env:"):
            return os.environ.get(question[4:], "")
        return str(question in sys.modules)
