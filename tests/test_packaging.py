"""What is shipped: the wheel is built as a release would be, installed elsewhere, and used from there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT, wait_until
from tests.support.processes import Processes

SHOP = """
from pathlib import Path
import dramatiq

@dramatiq.actor
def greet(path, text):
    Path(path).write_text(text)
"""

MIGRATE = """
import sys
import dramatiq_durable
from dramatiq_durable.migrate import migrate

assert dramatiq_durable.__file__.startswith(sys.prefix), dramatiq_durable.__file__
migrate(sys.argv[1])
"""

SEND = """
import sys
import dramatiq_durable.app
import shop

shop.greet.send(sys.argv[1], "hello")
"""


# One group (Makefile: --dist loadgroup): only one of pytest-xdist's processes builds and installs it.
pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.timeout(600)]


def run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source distribution: both have to be complete."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel and what it says it needs, and nothing else."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
    return python


def test_the_wheel_has_the_sql_and_nothing_of_the_repository(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sql = {str(path.relative_to(ROOT)) for path in (ROOT / "sql").rglob("*.sql")}
    assert sql
    assert {name.removeprefix("dramatiq_durable/") for name in names if name.endswith(".sql")} == sql
    assert "dramatiq_durable/py.typed" in names
    tops = {name.partition("/")[0].partition("-")[0] for name in names}
    assert tops == {"dramatiq_durable", "pytest_dramatiq_durable.py"}


def test_the_installed_wheel_migrates_a_database_and_runs_a_message(
    installed: Path, run_process: Processes, empty_database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    environment = {"PYTHONPATH": "", "DRAMATIQ_DURABLE_URL": empty_database_url, "DRAMATIQ_DURABLE_IMPORT": "shop"}

    def program(code: str, argument: str | Path = "") -> None:
        process = run_process(installed, "-c", code, argument, env=environment, cwd=tmp_path)
        assert process.wait(timeout=60) == 0, process.output

    program(MIGRATE, empty_database_url)
    command_line = run_process(installed.parent / "dramatiq-durable", "migrate", env=environment, cwd=tmp_path)
    assert command_line.wait() == 0, command_line.output
    assert command_line.output == "the namespace durable is up to date\n"
    greeting = tmp_path / "greeting"
    program(SEND, greeting)
    command = (installed, "-m", "dramatiq", "dramatiq_durable.app", "--processes", "1")
    worker = run_process(*command, env=environment, cwd=tmp_path)
    wait_until(lambda: greeting.exists() and greeting.read_text() == "hello", timeout=30, message="greeting")
    assert worker.stop() == 0, worker.output
