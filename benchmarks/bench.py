"""What every question needs: the options, the servers, players in their places, and rounds that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from dramatiq import Message

from benchmarks.contenders import STUB, Contender
from benchmarks.counters import Counters
from benchmarks.processes import ContenderFailed, Player, Workers
from benchmarks.report import Report, Table
from benchmarks.services import Services
from benchmarks.systems.base import PAYLOAD


@dataclass(frozen=True)
class Options:
    """What the command line says; ``__main__`` describes each."""

    messages: int = 40_000
    rounds: int = 3
    probes: int = 300
    idle: float = 3.0
    watch: float = 15.0
    backlog: int = 100_000
    runs: int = 1_000


class Bench:
    """A run of the benchmark."""

    def __init__(self, options: Options, services: Services, report: Report, peers: Sequence[Contender]) -> None:
        self.options = options
        self.services = services
        self.report = report
        self.peers = peers
        self.counters = Counters(services.admin)
        #: How long the actor's one argument is, so that the whole message has `PAYLOAD` bytes.
        self.size = PAYLOAD - len(Message("noop", "noop", ("",), {}, {}).encode())
        self._players: list[Player] = []
        self._places: dict[tuple[str, str], str] = {}
        self._prepared: set[tuple[str, str]] = set()
        self._senders: dict[tuple[str, str], Player] = {}

    def place(self, contender: Contender, question: str) -> str:
        """The URL of a contender's own database (or server) for a question."""
        key = (contender.name, question)
        if key not in self._places:
            if contender.service == "postgres":
                self._places[key] = self.services.database("_".join(key))
            else:
                self._places[key] = self.services.url(contender.service)
        return self._places[key]

    def player(self, contender: Contender, question: str, environment: Mapping[str, str] | None = None) -> Player:
        """A new process of a contender."""
        # Databases are apart; where there are none, the queues are.
        queue = {} if contender.service == "postgres" else {"BENCHMARK_QUEUE": f"{contender.name}-{question}"}
        player = Player(contender, self.place(contender, question), {**queue, **(environment or {})})
        self._players.append(player)
        if (contender.name, question) not in self._prepared:
            self._prepared.add((contender.name, question))
            player.ask("prepare")
        return player

    def sender(self, contender: Contender, question: str, environment: Mapping[str, str] | None = None) -> Player:
        """The process that sends for a question, the same in all rounds."""
        key = (contender.name, question)
        if key not in self._senders:
            self._senders[key] = self.player(contender, question, environment)
        return self._senders[key]

    @contextmanager
    def working(
        self,
        contender: Contender,
        question: str,
        processes: int = 1,
        *,
        before: Callable[[Player], Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Workers]:
        """Worker processes that begin at one moment, when all are up; they are gone after the block.

        Parameters:
          before(Callable): done with the first of them before it begins to work.
        """
        players = [self.player(contender, question, environment) for _ in range(processes)]
        try:
            if before is not None:
                before(players[0])
            workers = Workers(players)
            workers.begin()
            yield workers
        finally:
            for player in players:
                player.close()
                self._players.remove(player)

    def drain(
        self,
        contender: Contender,
        question: str,
        messages: int,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Store messages in bulk, then have workers process them; answers what they report."""

        def store(player: Player) -> None:
            player.ask("store", n=messages, size=self.size)

        in_memory = contender is STUB
        if not in_memory:
            store(self.sender(contender, question, environment))
        before = store if in_memory else None
        with self.working(contender, question, processes, before=before, environment=environment) as workers:
            workers.wait_for(messages)
            acknowledged = self._acknowledged(contender, question)
            report = workers.report()
        if acknowledged is not None:
            report["seconds"] = acknowledged - report["first"]
        return report

    def _acknowledged(self, contender: Contender, question: str) -> float | None:
        """When the last message was acknowledged, in seconds of the monotonic clock, if that was after a first look.

        Some start messages long before they acknowledge them: for those a drain ends here.
        """
        if not contender.left:
            return None
        at_once = True
        with psycopg.connect(self.place(contender, question), autocommit=True) as conn:
            deadline = time.monotonic() + 60
            while (row := conn.execute(contender.left.encode()).fetchone()) is not None and row[0]:
                at_once = False
                if time.monotonic() > deadline:
                    raise ContenderFailed(f"{contender.label}: {row[0]} messages were started and not acknowledged")
                time.sleep(0.002)
        return None if at_once else time.monotonic()

    def rounds(self, table: Table, turns: Mapping[str, tuple[Contender, Callable[[], Any]]]) -> dict[str, list[Any]]:
        """Let all take turns, round by round: what disturbs the machine disturbs everybody.

        A peer that fails is left out from then on, and the table says why.

        Returns:
          What each turn answered, one answer a round, for those who came through all rounds.
        """
        answers: dict[str, list[Any]] = {name: [] for name in turns}
        for number in range(self.options.rounds):
            self.report.say(f"{table.title} (round {number + 1} of {self.options.rounds}) ...")
            for name, (contender, turn) in turns.items():
                if name not in answers:
                    continue
                try:
                    answers[name].append(turn())
                except ContenderFailed as e:
                    if contender not in self.peers:
                        raise
                    del answers[name]
                    table.notes.append(f"{contender.label} failed: {str(e).splitlines()[-1]}")
        return answers

    def close(self) -> None:
        for player in self._players:
            player.close()


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios within each round, where both met the same machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
