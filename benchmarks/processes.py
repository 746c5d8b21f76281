"""Players, as the benchmark sees them: processes that take commands."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from benchmarks.contenders import ROOT, Contender

#: How long a player may think about a command, in seconds.
PATIENCE = 300


class ContenderFailed(Exception):
    """A player ended, hung, or raised; the message has its last words."""


class Player:
    """A process of a contender; see ``benchmarks/player.py`` for what it can be told."""

    def __init__(self, contender: Contender, url: str, environment: Mapping[str, str]) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        ours = ("DRAMATIQ_", "dramatiq_", "PG")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self._process = subprocess.Popen(
            [contender.python, "-m", "benchmarks.player", contender.system],
            cwd=ROOT,
            env={
                **inherited,
                "PYTHONPATH": os.fspath(ROOT),
                "BENCHMARK_URL": url,
                **contender.environment,
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout

    def tell(self, do: str, **arguments: Any) -> None:
        """Give a command, without waiting for its answer."""
        try:
            self._commands.write(json.dumps({"do": do, "with": arguments}) + "\n")
            self._commands.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None

    def answer(self, takes: float = 0) -> Any:
        """Wait for the answer to the command before.

        Parameters:
          takes(float): how many seconds it takes when all goes well.

        Raises:
          ContenderFailed: there is none.
        """
        timer = threading.Timer(takes + PATIENCE, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            line = self._answers.readline()
        finally:
            timer.cancel()
        if not line:
            raise self._failed("gave no answer")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(f"{self.contender.label}: {answer['error'].strip()}")
        return answer["answer"]

    def ask(self, do: str, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        return self.answer()

    def _failed(self, what: str) -> ContenderFailed:
        self._errors.seek(0)
        return ContenderFailed(f"{self.contender.label} {what}: {self._errors.read()[-2000:].strip()}")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._errors.close()


class Workers:
    """Worker processes of a contender."""

    def __init__(self, players: Sequence[Player]) -> None:
        self.players = players

    def begin(self) -> None:
        """Begin to work.  All are up before the first begins: starting Python is not what is measured."""
        for player in self.players:
            player.ask("progress")
        for player in self.players:
            player.tell("work")
        for player in self.players:
            player.answer()

    def wait_for(self, messages: int, *, patience: float = 60) -> None:
        """Wait until so many messages were started.

        Raises:
          ContenderFailed: nothing was started for ``patience`` seconds.
        """
        seen, deadline = 0, time.monotonic() + patience
        while (now := sum(player.ask("progress") for player in self.players)) < messages:
            if now > seen:
                seen, deadline = now, time.monotonic() + patience
            if time.monotonic() > deadline:
                raise ContenderFailed(f"{self.players[0].contender.label}: {now} of {messages} messages, no more")
            time.sleep(0.03)

    def report(self) -> dict[str, Any]:
        """What they did, taken together; afterwards they are stopped, and everything is acknowledged."""
        reports = [player.ask("report") for player in self.players]
        stopped = [player.ask("stop") for player in self.players]
        busy = [r for r in reports if r["n"]]
        counted = [r["instructions"] for r in reports]
        first = min((r["first"] for r in busy), default=0) / 1e9
        return {
            "n": sum(r["n"] for r in reports),
            "first": first,
            "seconds": max((r["last"] for r in busy), default=0) / 1e9 - first,
            "late": sorted(late / 1e6 for r in reports for late in cast(list[int], r["late"])),
            "instructions": None if None in counted else sum(counted),
            "cpu": sum(r["cpu"] for r in reports),
            "round_trips": sum(s.get("round_trips", 0) for s in stopped),
        }
