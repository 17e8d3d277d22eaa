from __future__ import annotations

import sys
from pathlib import Path

# Scripts are run from their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
