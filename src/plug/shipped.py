"""The model that comes with the package: its name, which stands for a directory everywhere."""

from __future__ import annotations

from pathlib import Path

SHIPPED_MODEL = "plug-mini-zh"
SHIPPED_DIRECTORY = Path(__file__).parent / "assets" / SHIPPED_MODEL
