"""Grafana's dashboards, written as code.  ``python -m grafana`` builds what is in dashboards/.

Only what is built is needed to use them: see docs/metrics.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from . import postgres, streams, workers, workflows

#: Where the dashboards are, as Grafana reads them.
FOLDER = Path(__file__).parent / "dashboards"


def built() -> dict[str, str]:
    """The dashboards as JSON, by the names of their files."""
    pages = {"streams": streams, "workflows": workflows, "workers": workers, "postgres": postgres}
    return {f"{name}.json": _text(page.dashboard()) for name, page in pages.items()}


def _text(dashboard: Any) -> str:
    found = json.loads(json.dumps(dashboard, cls=JSONEncoder))
    # What the builders say of themselves: that links are put away into a menu, and what only variables of times have.
    for link in found["links"]:
        del link["placement"]
    for variable in found["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):
            del variable[name]
    return json.dumps(found, indent=2, sort_keys=True) + "\n"
