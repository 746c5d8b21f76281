"""Grafana's dashboards, written as code.  ``python -m grafana`` builds what is in dashboards/.

Only what is built is needed to use them: see docs/metrics.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from . import postgres, streams, workers, workflows

#: Where the dashboards are, as Grafana reads them.
FOLDER = Path(__file__).parent / "dashboards"


def built() -> dict[str, str]:
    """The dashboards as JSON, by the names of their files."""
    pages = {"streams": streams, "workflows": workflows, "workers": workers, "postgres": postgres}
    return {
        f"{name}.json": json.dumps(page.dashboard(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, page in pages.items()
    }
