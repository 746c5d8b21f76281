"""prometheus_client's multiprocess mode: what was counted, as files that its `MultiProcessCollector` reads.

The files are our own, beside those of prometheus_client's values: what it has chosen as its value class, which it does
once and for all when it is imported, does not matter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

from .cells import Cell
from .recorder import counted

#: How large a file is at first, in bytes.
SIZE = 1 << 16


class Files:
    """This process's files in a directory.

    Parameters:
      directory(str): the one in ``PROMETHEUS_MULTIPROC_DIR``.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        #: What an earlier process with the same id has left: it goes on from there.
        self._left: dict[tuple[str, str], float] = {}

    def write(self) -> None:
        """Write everything that was counted so far."""
        for metric, series in counted().items():
            names = ["namespace", *metric.labels]
            base = metric.name.removesuffix("_total")
            for labels, value in series.items():
                if not isinstance(value, Cell):
                    key = mmap_key(base, metric.name, names, [*labels], metric.meaning)
                    self._set("counter", key, float(value))
                    continue
                for bound, count in zip((*metric.bounds, float("inf")), value.counts, strict=True):
                    bucket = [*labels, floatToGoString(bound)]
                    key = mmap_key(base, f"{base}_bucket", [*names, "le"], bucket, metric.meaning)
                    self._set("histogram", key, float(count))
                self._set("histogram", mmap_key(base, f"{base}_sum", names, [*labels], metric.meaning), value.sum)

    def close(self) -> None:
        """Close the files; what is in them stays."""
        for file in self._files.values():
            file.close()

    def _set(self, type: str, key: str, value: float) -> None:
        file = self._files.get(type)
        if file is None:
            # Its first word tells the collector the type; the rest only has to be this process's own.
            path = Path(self.directory) / f"{type}_dramatiqdurable{os.getpid()}.db"
            if not path.exists():
                # Whoever reads the directory in this moment chokes on a file that is empty: this one was never seen so.
                new = path.with_suffix(".new")
                new.write_bytes(bytes(SIZE))
                new.rename(path)
            file = self._files[type] = MmapedDict(os.fspath(path))
        if (type, key) not in self._left:
            self._left[type, key] = file.read_value(key)[0]
        file.write_value(key, self._left[type, key] + value, 0.0)
