from __future__ import annotations

import pytest
from recording import Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
