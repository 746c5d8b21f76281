"""Dramatiq's own tests, unmodified, on our broker, our backends and the real command.

They come from the source distribution of the Dramatiq that is installed; DRAMATIQ_SUITE names a folder with another
copy of its tests, a checkout's for example, which has more of them.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

#: Our files, and what they are in the suite.
FILES = {
    "brokers.py": "__init__.py",
    "common.py": "common.py",
    "fixtures.py": "conftest.py",
    "inapplicable.py": "inapplicable.py",
}


@pytest.fixture
def suite(tmp_path: Path, run_process: Any) -> Path:
    """A folder with the suite in ``tests``, and our files in place of its own helpers."""
    chosen = os.environ.get("DRAMATIQ_SUITE")
    if chosen:
        shutil.copytree(chosen, tmp_path / "tests")
    else:
        release = f"dramatiq=={importlib.metadata.version('dramatiq')}"
        download = run_process(
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", tmp_path, release)
        )
        assert download.wait(timeout=120) == 0, download.output
        [archive] = tmp_path.glob("dramatiq-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, filter="data")
        next(tmp_path.glob("dramatiq-*/tests")).rename(tmp_path / "tests")
    for source, target in FILES.items():
        shutil.copy(Path(__file__).parent / "files" / source, tmp_path / "tests" / target)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_dramatiqs_own_tests_pass(suite: Path, run_process: Any, database_url: str) -> None:
    def run(*options: str) -> Any:
        process = run_process(
            *(sys.executable, "-m", "pytest", "-ra", *options, "tests"),
            env={"SUITE_DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)},
            cwd=suite,
        )
        code = process.wait(timeout=800)
        print(process.output)
        return code

    # Many of them give a process a second to start, or two threads ten milliseconds: on a busy machine what has failed
    # gets a second chance.
    if run() != 0:
        assert run("--last-failed") == 0
