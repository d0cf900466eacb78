"""The model that ships, its texts, and `qkern demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["CALIBRATION", "HELDOUT", "MODEL", "SEARCH"]

MODEL: Final = Path(__file__).parent / "data" / "bible"
"""A trained Qwen2-architecture model of 2.9 million parameters; its README.md says how it was made."""
CALIBRATION: Final = MODEL / "calibration.txt"
"""Text for calibration; disjoint from the other two."""
SEARCH: Final = MODEL / "search.txt"
"""Text that a search may score candidates on."""
HELDOUT: Final = MODEL / "heldout.txt"
"""Whole books that neither training, calibration nor search saw."""
