"""Builds the dashboards: ``python -m grafana``."""

from __future__ import annotations

from . import FOLDER, built

for name, text in built().items():
    (FOLDER / name).write_text(text)
