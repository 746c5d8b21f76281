"""`dramatiq-durable top`: in real terminals, on a real database, with real workers and real keys."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest
from click.testing import CliRunner
from dramatiq.middleware import Retries
from rich.cells import cell_len

import dramatiq_durable as durable
from dramatiq_durable import embedded
from dramatiq_durable.cli import main
from dramatiq_durable.cli.top.terminal import ENTER, LEAVE, parse
from dramatiq_durable.migrate import migrate
from dramatiq_durable.settings import Settings
from tests.support import ROOT, wait_until
from tests.top.screen import Screen

pytestmark = pytest.mark.administrator

TOP = ["-m", "dramatiq_durable.cli", "--url"]

#: A stream nobody consumes, a run whose code fails, an escalation, a worker that is silent with a message.
TROUBLE = """
SELECT durable.open_streams('{nobody,away}');
INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)
SELECT gen_random_uuid(), s.stream_id, 0, now() - interval '1 hour', now(), 'lonely', '{}'
FROM durable.stream s WHERE s.name = 'nobody';
INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, task_failure)
SELECT '00000000-0000-4000-8000-000000000001', 'order-17', s.stream_id, 'order', 'running', now() - interval '2 hours',
       3, 'Traceback' || chr(10) || 'Nondeterminism: command 2 was charge'
FROM durable.stream s WHERE s.name = 'nobody';
INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, priority, opened_at)
SELECT gen_random_uuid(), '00000000-0000-4000-8000-000000000001', 2, s.stream_id, 'clerk', 0, now() - interval '3 hours'
FROM durable.stream s WHERE s.name = 'nobody';
INSERT INTO durable.worker (login, principal_id, host, pid, stream_ids, threads, reclaim_delay, reclaim_count, beat_at)
SELECT session_user, 1, 'web-9', 4711, ARRAY[s.stream_id], 4, interval '30 s', 3, now() - interval '10 minutes'
FROM durable.stream s WHERE s.name = 'away';
"""


#: What whoever may send, or work, can make names of: sequences of terminals, in both ways of writing them, lines, text
#: that runs backwards, wide characters, and as much as fits.
HOSTILE = """
SELECT durable.open_streams(ARRAY[
    E'ev\\x1b[31mil\\x1b]0;owned\\x07\\u0085\\u202e', repeat('long', 50), '名前', E'two\\nlines\\t']);
INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, last_failure)
SELECT gen_random_uuid(), s.stream_id, 0, now() - interval '1 hour', now(), E'act\\x1b[2J\\u009b31mor\\u200b',
       '\\x1b5b324a1b',
       E'Traceback\\n\\x1b]52;c;AAAA\\x07 \\u009dno'
FROM durable.stream s;
INSERT INTO durable.dead_letter (
    message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, failure, payload)
SELECT gen_random_uuid(), s.stream_id, 0, now(), 3, 3, E'act\\x1b[2Jor', 'poison', E'a\\r\\x1b[1mb\\u202e', '\\x1b'
FROM durable.stream s;
INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, task_failure)
SELECT '00000000-0000-4000-8000-000000000001', E'w\\x1b[5m' || repeat('長', 150), s.stream_id, E'na\\x1b[7mme',
       'running', now() - interval '2 hours', 3, E'Evil: \\x1b[31mred\\x1b]52;c;AAAA\\x07'
FROM durable.stream s WHERE s.name = '名前';
INSERT INTO durable.worker (login, principal_id, host, pid, stream_ids, threads, reclaim_delay, reclaim_count, beat_at)
SELECT session_user, 1, E'ho\\x1b[31mst' || repeat('x', 180), 4711, ARRAY[s.stream_id], 4, interval '30 s', 3,
       now() - interval '9 min'
FROM durable.stream s WHERE s.name = '名前';
INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, priority, opened_at)
SELECT gen_random_uuid(), '00000000-0000-4000-8000-000000000001', 2, s.stream_id, E'cl\\x1b[31merk', 0, now()
FROM durable.stream s WHERE s.name = '名前';
"""


class Work:
    """A worker with a message that it runs, one that is delayed, and those that it refuses."""

    def __init__(self, url: str) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.broker = durable.DurableBroker(
            url, middleware=[Retries(max_retries=0)], settings=Settings(poll_interval=0.2)
        )

        def slow(name: str) -> None:
            self.begun.set()
            while not self.go.wait(0.01):
                pass

        def broken(n: int) -> None:
            raise ValueError(f"could not do {n}")

        self.slow = dramatiq.actor(slow, queue_name="payments", broker=self.broker)
        self.broken = dramatiq.actor(broken, queue_name="mails", broker=self.broker)
        self.slow.send("o-17")
        self.slow.send_with_options(args=("later",), delay=3_600_000)
        self.broken.send(1)
        self.worker = dramatiq.Worker(self.broker, worker_timeout=50, worker_threads=2)
        self.worker.start()
        assert self.begun.wait(20)

    def close(self) -> None:
        self.go.set()
        self.worker.stop()
        self.broker.close()


@pytest.fixture
def work(database_url: str) -> Iterator[Work]:
    work = Work(database_url)
    yield work
    work.close()


@pytest.fixture
def start(database_url: str) -> Iterator[Callable[..., Screen]]:
    screens: list[Screen] = []

    def open_screen(url: str = database_url, **options: Any) -> Screen:
        screens.append(Screen(*TOP, url, "top", "--interval", "200ms", **options))
        return screens[-1]

    yield open_screen
    for screen in screens:
        screen.close()


def once(url: str, *arguments: str, width: int = 120) -> str:
    done = subprocess.run(
        [sys.executable, *TOP, url, "top", "--once", "--interval", "200ms", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": str(width), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def dead(work: Work) -> bool:
    return any(dead for *_, dead in [work.broker.get_queue_message_counts("mails")])


def trouble(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(TROUBLE)


# --- one frame ----------------------------------------------------------------------------------------------------


def test_one_frame_as_json(database_url: str, work: Work) -> None:
    wait_until(lambda: dead(work))
    trouble(database_url)
    found = json.loads(once(database_url, "--json"))
    streams = {stream["name"]: stream for stream in found["streams"]}
    payments, mails = streams["payments"], streams["mails"]
    assert [payments[name] for name in ("ready", "leased", "delayed", "dead", "workers")] == [0, 1, 1, 0, 1]
    assert (mails["dead"], mails["dead_by_reason"], mails["change_rate"]) == (1, {"rejected": 1}, 0)
    assert 3600 <= streams["nobody"]["oldest"] < 3700
    assert {worker["state"]: worker["holds"] for worker in found["workers"]} == {"live": 1, "silent": 0}
    assert found["runs"]["running"] == 1
    assert found["escalations"][0]["role"] == "clerk"
    assert set(found["rates"]) == {"in", "out", "dead", "runs_started"}
    stuck = {(line["what"], line["name"]): line for line in found["stuck"]}
    assert set(stuck) == {
        ("no worker", "nobody"), ("silent worker", f"worker {found['workers'][1]['worker_id']}"),
        ("task fails", "order-17"), ("waits for", "clerk"), ("dead: rejected", "mails"),
    }  # fmt: skip
    assert stuck["task fails", "order-17"]["detail"] == "order: Nondeterminism: command 2 was charge"
    assert stuck["no worker", "nobody"]["detail"].startswith("lonely ")
    assert [line["bad"] for line in found["stuck"]] == [True, True, True, True, False]
    died = stuck["dead: rejected", "mails"]
    assert (died["count"], died["detail"].partition(" broken ")[0]) == (1, "the latest:")
    assert died["detail"].endswith("attempt 1, ValueError: could not do 1")


@pytest.mark.parametrize("width", [60, 200])
def test_one_frame_is_as_wide_as_it_may_be(database_url: str, work: Work, width: int) -> None:
    trouble(database_url)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams(ARRAY[repeat('long', 49), E'evil\\x1b[31m', '名前'])")
    shown = once(database_url, width=width)
    lines = shown.splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert "\x1b" not in shown
    for text in (" STREAMS", "payments", "nobody", " WORKERS", "silent", " RUNS", " STUCK", "task fails", "名前"):
        assert text in shown, text
    assert ("web-9" in shown and "Nondeterminism: command 2 was charge" in shown) == (width == 200)
    heads = next(line for line in lines if "ready" in line).split()
    assert ("workers" in heads) == (width == 200)
    assert "oldest" in heads


def test_a_monitor_sees_figures_and_no_names(database_url: str, work: Work, start: Callable[..., Screen]) -> None:
    trouble(database_url)
    login = durable.provision_worker_role(database_url, name="watching", kind="monitor")
    shown = once(login.url)
    assert "as a monitor" in shown
    assert re.search(r"payments +0 +1 +1 +0", shown)
    assert "clerk" in shown
    assert "order-17" not in shown
    wait_until(lambda: dead(work))
    screen = start(login.url)
    screen.shows("payments")
    screen.press("j\r")
    screen.shows("dead by reason", "takes an administrator")
    screen.press("qq")
    assert screen.wait() == 0
    durable.revoke_worker_role("watching", url=database_url)


def test_who_may_not_look(database_url: str) -> None:
    login = durable.provision_worker_role(database_url, name="scoped", streams=["mails"])
    done = CliRunner().invoke(main, ["--url", login.url, "top", "--once"])
    assert done.exit_code == 1
    assert (
        "an administrator of the namespace, or a monitor: `dramatiq-durable role provision NAME --kind" in done.output
    )
    durable.revoke_worker_role("scoped", url=database_url)


def test_an_older_schema(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("DELETE FROM durable.migration WHERE version = (SELECT max(version) FROM durable.migration)")
    done = CliRunner().invoke(main, ["--url", database_url, "top", "--once"])
    assert done.exit_code == 1
    assert "Run `dramatiq-durable migrate`" in done.output


def test_what_cannot_be(database_url: str) -> None:
    def refused(*arguments: str, url: str = database_url) -> str:
        done = CliRunner().invoke(main, ["--url", url, "top", *arguments])
        assert done.exit_code != 0
        return done.output

    assert "--json goes with --once" in refused("--json")
    assert "no terminal that can show a screen: --once prints one frame" in refused()
    assert "is not from 100ms to 1h" in refused("--interval", "1ms")
    assert "not a duration" in refused("--interval", "soon")

    assert "Is the server running" in refused("--once", url="postgresql://x@127.0.0.1:1/x")


# --- keys -----------------------------------------------------------------------------------------------------


def test_keys(database_url: str, work: Work, start: Callable[..., Screen]) -> None:
    wait_until(lambda: dead(work))
    trouble(database_url)
    screen = start()
    screen.shows("> away", "payments", "nobody", "task fails")
    # Arrows, also as some terminals have them, and letters; not beyond the ends.
    for keys, chosen in (
        ("j", "mails"),
        ("\x1b[B", "nobody"),
        ("\x1bOB\x1bOB", "payments"),
        ("kk", "mails"),
        ("\x1b[A" * 9, "away"),
    ):
        screen.press(keys)
        screen.shows(f"> {chosen}")
    screen.press("\x1b[F\r")
    shown = screen.shows("stream payments", "leased", "delayed", '"o-17"', "workers: 1")
    assert "STREAMS" not in shown
    screen.press("q")
    screen.shows("STREAMS", "> payments")
    # A dead letter, with why.
    screen.press("\x1b[Hj\r")
    screen.shows("stream mails", "rejected", "ValueError: could not do 1")
    screen.press("\x1b")
    screen.shows("STREAMS")
    # Sorted by what waits: the one that has something comes first.
    screen.press("s")
    screen.shows("by ready")
    names = re.findall(r"^[! ][> ] (away|mails|nobody|payments) ", screen.text, re.MULTILINE)
    assert names[0] == "nobody"
    # A filter: typed, with a mistake, kept, and given up.
    screen.press("/paX\x7fy")
    assert not re.search("^[! ][> ] mails", screen.shows("filter: pay", "1 of 4"), re.MULTILINE)
    screen.press("\r")
    screen.shows("filter: pay (escape none)")
    screen.press("\x1b")
    screen.shows("mails")
    # The other tables; from what is stuck into a run.
    screen.press("\t")
    screen.shows("> ", "by worker")
    screen.press("\r")
    screen.shows("worker 1", "slow", "payments", "host: ")
    # All at once, as whoever knows the way types.
    screen.press("q4/no worker\r\r")
    screen.shows("stream nobody", "lonely")
    screen.press("q4/order-17\r\r")
    screen.shows(
        "run 00000000-0000-4000-8000-000000000001", "workflow id: order-17", "Nondeterminism", "escalation  clerk"
    )
    screen.press("q3\r")
    screen.shows("runs running", "order-17")
    screen.press("\r")
    screen.shows("workflow id: order-17")
    screen.press("qqq")
    assert screen.wait() == 0
    assert screen.is_as_before()


def test_what_the_keys_and_columns_are(work: Work, start: Callable[..., Screen]) -> None:
    screen = start(width=80, height=24)
    screen.shows("payments", "? help")
    screen.press("x\x1b[15~€0")
    screen.press("?")
    shown = screen.shows("another table", "STUCK says why", "q back")
    assert "…" not in shown
    # Any key leads back, and does nothing else.
    screen.press("q")
    screen.shows("STREAMS", "> mails")
    screen.press("q")
    assert screen.wait() == 0


def test_one_message_closely(work: Work, database_url: str, start: Callable[..., Screen]) -> None:
    wait_until(lambda: dead(work))
    trouble(database_url)
    screen = start(width=100, height=40)
    screen.shows("> away")
    screen.press("j\r")
    screen.shows("stream mails", "in/s: ", "paused: no", "dead-letter list --stream mails", "MESSAGES 1")
    screen.press("\r")
    shown = screen.shows("TRACEBACK", "arguments: 1", "reason: rejected", "dead-letter show ", "failure: ValueError")
    assert "Traceback (most recent call last):" in shown
    assert 'raise ValueError(f"could not do {n}")' in shown
    screen.press("qq\x1b[F\r")
    screen.shows("stream payments", "leased", "MESSAGES 2")
    screen.press("\r")
    screen.shows("state: leased", 'arguments: "o-17"', "none was kept", "message abort ")
    # What a worker holds; a run, with more of why its task fails than has room in a line.
    screen.press("qq2\r")
    screen.shows("worker 1", "silent: ", "worker show 1")
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("UPDATE durable.run SET task_failure = 'Nondeterminism: ' || repeat('very ', 30) || 'long'")
    screen.press("q4/order-17\r\r")
    shown = screen.shows("run 00000000-0000-4000-8000-000000000001", "workflow show --run-id ", "very")
    assert "".join(line.strip() for line in shown.splitlines()).replace(" ", "").count("very" * 30 + "long") == 1
    screen.press("\x03")
    assert screen.wait() == 0


def test_what_stands_out(database_url: str) -> None:
    """Somebody who has never seen the code finds what is wrong, also without colours."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{paused,stands}'); SELECT durable.pause_stream('paused', true)")
        conn.execute(
            "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, kind) "
            "SELECT gen_random_uuid(), s.stream_id, 0, now() - interval '10 minutes', now(), 'a', '{}', k "
            "FROM durable.stream s, (VALUES ('m'), ('w')) x (k) WHERE s.name IN ('paused', 'stands')"
        )
        conn.execute(
            "INSERT INTO durable.worker (login, principal_id, host, pid, stream_ids, threads, reclaim_delay, "
            "reclaim_count) SELECT session_user, 1, 'web-9', 4711, array_agg(s.stream_id), 4, interval '1 hour', 3 "
            "FROM durable.stream s"
        )
        conn.execute(
            "INSERT INTO durable.dead_letter (message_id, stream_id, priority, enqueued_at, died_at, attempt, deaths, "
            "actor, reason, failure, payload) SELECT gen_random_uuid(), s.stream_id, 0, now(), "
            "now() - n * interval '1 minute', 3, 3, 'crash', r, 'the worker died 3 times', '{}' "
            "FROM durable.stream s, (VALUES ('poison', 7), ('poison', 9), ('rejected', 90)) x (r, n) "
            "WHERE s.name = 'stands'"
        )
    shown = once(database_url, width=160)
    stuck = shown.partition(" STUCK ")[2]
    for line in (
        r"! +poison +stands +2 +7m[ \d]*s? +the latest: crash \S+, attempt 3, the worker died 3 times",
        r"! +nothing ends +stands +2 +10m[ \d]*s? +a ",
        r"! +timers overdue +stands +1",
        r"! +timers overdue +paused +1",
        r"  +paused +paused +2 +10m[ \d]*s? +a ",
    ):
        assert re.search(rf"^{line}", stuck, re.MULTILINE), (line, stuck)
    assert "rejected" not in stuck, "that was longer ago than an hour"
    assert shown.splitlines()[0].endswith("  5 stuck")


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}])
def test_no_name_writes_to_the_terminal(
    database_url: str, start: Callable[..., Screen], environment: dict[str, str]
) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(HOSTILE)
    screen = start(width=90, height=30, environment=environment)
    screen.shows("STUCK", "ev\\x1b[31mil")
    for keys, seen in (
        ("\r", "MESSAGES 2"), ("\r", "TRACEBACK"), ("qq", "STREAMS"), ("2\r", "host: ho\\x1b[31mst"),
        ("q", "STREAMS"), ("3\r", "task failure"), ("\r", "task failure: Evil: \\x1b[31mred"), ("qq", "STREAMS"),
        ("s\t/ev\x1b", "STREAMS"),
    ):  # fmt: skip
        screen.press(keys)
        screen.shows(seen)
    screen.press("q")
    assert screen.wait() == 0
    # What is left without our own sequences is letters.
    left = re.sub(r"\x1b\[(\?25[lh]|\?1049[lh]|[0-9;]*m|[HJK])|\r+\n", "", screen.output)
    assert [c for c in set(left) if not c.isprintable()] == []
    assert {*re.findall(r"\x1b\[([0-9;]*)m", screen.output)} <= {
        "0", "1", "2", "2;4", "7", "1;7", "31", "33", "7;31", "7;33", "1;31", "1;33", "1;36",
    }  # fmt: skip
    assert max(cell_len(line) for line in screen.frame) <= 90


def test_a_terminal_that_shows_no_screen(start: Callable[..., Screen]) -> None:
    screen = start(environment={"TERM": "dumb"})
    assert screen.wait() == 2
    wait_until(lambda: "--once prints one frame" in screen.output)
    assert ENTER not in screen.output


def test_it_goes_on_until_it_is_paused(database_url: str, work: Work, start: Callable[..., Screen]) -> None:
    screen = start()
    screen.shows("mails")
    screen.press("p")
    screen.shows("paused")
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{new}')")
        # It asks nothing any more.
        asked = (
            "SELECT max(query_start) FROM pg_stat_activity WHERE query LIKE '%%relname%%' AND pid <> pg_backend_pid()"
        )
        [first] = conn.execute(asked).fetchone() or ()
        screen.press("j")
        screen.shows("> payments")
        assert conn.execute(asked).fetchone() == (first,)
    assert "new" not in screen.text
    screen.press("p")
    screen.shows("new")


def test_rates_and_dead_letters_that_grow(work: Work, start: Callable[..., Screen]) -> None:
    wait_until(lambda: dead(work))
    screen = start()
    screen.shows("mails")
    assert re.search(r"! +dead: rejected +mails +1 ", screen.text)
    work.broken.send(2)
    wait_until(lambda: re.search(r"! +dead: rejected +mails +2 .* could not do 2", screen.text), timeout=30)
    sent = threading.Event()

    def send() -> None:
        while not sent.wait(0.02):
            work.slow.send_with_options(args=("x",), delay=3_600_000)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        wait_until(lambda: re.search(r"payments .* \+[1-9]", screen.line(" payments ")), timeout=30)
        wait_until(lambda: re.search(r"\bin [1-9]", screen.text), timeout=30)
    finally:
        sent.set()
        sender.join()


# --- the terminal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["q", "ctrl-c", "SIGTERM", "SIGHUP", "while typing"])
def test_the_terminal_is_left_as_it_was(work: Work, start: Callable[..., Screen], how: str) -> None:
    screen = start(width=80, height=24)
    screen.shows("payments")
    assert not screen.is_as_before()
    if how == "q":
        screen.press("q")
    elif how == "ctrl-c":
        screen.press("\x03")
    elif how == "while typing":
        screen.press("/abc")
        screen.shows("filter: abc")
        screen.press("\x03")
    else:
        screen.signal(signal.Signals[how])
    assert screen.wait() == 0
    wait_until(screen.is_as_before, timeout=5)
    assert "Traceback" not in screen.output


def test_the_terminal_is_left_as_it_was_by_an_error(database_url: str) -> None:
    code = (
        "import sys; from dramatiq_durable.cli import main, top\n"
        "def broken(*_): raise ZeroDivisionError('in a frame')\n"
        "top.View.press = broken\n"
        "main(sys.argv[1:])"
    )
    screen = Screen("-c", code, "--url", database_url, "top", "--interval", "200ms")
    try:
        screen.shows("STREAMS")
        screen.press("j")
        assert screen.wait() == 1
        wait_until(screen.is_as_before, timeout=5)
        # It stands on the screen that is there afterwards.
        assert "ZeroDivisionError: in a frame" in screen.output.rpartition("\x1b[?1049l")[2]
    finally:
        screen.close()


def test_it_is_suspended_and_goes_on(work: Work, start: Callable[..., Screen]) -> None:
    screen = start(shell=True)
    screen.shows("payments")
    screen.press("\x1a")
    wait_until(lambda: "stopped, by lines: True" in screen.output, timeout=30)
    wait_until(lambda: screen.output.count(ENTER) == 2, timeout=30)
    screen.press("j")
    screen.shows("> payments")
    screen.press("q")
    assert screen.wait() == 0
    assert screen.output.count(LEAVE) == 2
    assert termios.tcgetattr(screen.theirs) == screen.before


def test_sizes(database_url: str, work: Work, start: Callable[..., Screen]) -> None:
    trouble(database_url)
    screen = start(width=200, height=50)
    screen.shows("change/s", "Nondeterminism: command 2 was charge")
    for width, height in ((60, 24), (200, 12), (60, 5), (20, 3), (200, 50)):
        screen.resize(width, height)
        wait_until(lambda height=height: len(screen.frame) == height, message=f"a frame of {height} lines")  # type: ignore[misc]
        assert max(cell_len(line) for line in screen.frame) <= width
    screen.shows("change/s", "Nondeterminism: command 2 was charge")


def test_a_long_table_scrolls(database_url: str, start: Callable[..., Screen]) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(
            "SELECT durable.open_streams(ARRAY(SELECT 'q' || lpad(n::text, 3, '0') FROM generate_series(1, 300) n))"
        )
    screen = start(width=80, height=24)
    screen.shows("1-", "of 300", "> q001")
    screen.press("\x1b[F")
    screen.shows("-300 of 300", "> q300")
    screen.press("\x1b[5~")
    screen.shows("> q290")


def test_a_restart_of_the_database(own_server: embedded.Server, start: Callable[..., Screen]) -> None:
    migrate(own_server.url)
    with psycopg.connect(own_server.url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{before}')")
    screen = start(own_server.url)
    screen.shows("before")
    own_server.restart("immediate")
    wait_until(lambda: "no answer for" in screen.output, message="that it does not answer")
    with psycopg.connect(own_server.url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{after}')")
    assert "no answer" not in screen.shows("after")
    screen.press("q")
    assert screen.wait() == 0


def test_it_waits_for_a_database_that_is_not_there(start: Callable[..., Screen]) -> None:
    screen = start("postgresql://x@127.0.0.1:1/x", width=150)
    screen.shows("durable in x on 127.0.0.1", "no answer for", "cannot connect to x@127.0.0.1:1/x")
    screen.press("j\rs\t/x\r")
    screen.shows("filter: x", "q quit")
    screen.press("q")
    assert screen.wait() == 0
    assert screen.is_as_before()


@pytest.mark.parametrize(
    ("data", "keys", "rest"),
    [
        (b"jk/q", ["j", "k", "/", "q"], b""),
        (b"\x1b[A\x1bOB\x1b[5~\x1b[1;5C", ["up", "down", "page up"], b""),
        (b"\r\n\t\x7f\x01", ["enter", "enter", "tab", "delete"], b""),
        (b"\x1b", [], b"\x1b"),
        (b"\x1b\x1b[A", ["escape", "up"], b""),
        (b"\x1bq", ["escape", "q"], b""),
        (b"a\x1b[", ["a"], b"\x1b["),
        ("é名".encode(), ["é", "名"], b""),
        ("名".encode()[:2], [], "名".encode()[:2]),
        (b"\xff\xfe\x80ab", [], b""),
    ],
)
def test_what_is_pressed(data: bytes, keys: list[str], rest: bytes) -> None:
    found, left = parse(data)
    if keys or rest:
        assert (found, left) == (keys, rest)


# --- much ---------------------------------------------------------------------------------------------------------


def test_looks_are_bounded(database_url: str) -> None:
    """Eight times as many messages, alarms, dead letters and runs: as many pages are read."""
    fill = """
    INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, kind)
    SELECT gen_random_uuid(), 1 + n %% 2, n %% 3, now() + interval '1 hour' * (n %% 5 - 2), now(), 'a', '{}', k
    FROM generate_series(1, %(many)s) n, (VALUES ('m'), ('d')) x (k);
    INSERT INTO durable.dead_letter (
        message_id, stream_id, priority, enqueued_at, died_at, attempt, deaths, actor, reason, payload)
    SELECT gen_random_uuid(), CASE WHEN n %% 10 < %(two)s THEN 2 ELSE 1 END, 0, now(), now() - n * interval '1 s', 3, 3,
           'a', 'rejected', '{}'
    FROM generate_series(1, %(many)s) n;
    INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, task_failure)
    SELECT gen_random_uuid(), gen_random_uuid()::text, 1, 'x', CASE WHEN n %% 4 = 0 THEN 'running' ELSE 'completed' END,
           now() - n * interval '1 s', 1, CASE WHEN n %% 8 = 0 THEN 'no' END
    FROM generate_series(1, %(many)s) n;
    """
    looks = (
        "find_stuck(500)", "stream_rates(10, 500)", "peek_messages('one', NULL, NULL, 100)",
        "list_dead_letters(NULL, NULL, 'one', NULL, NULL, NULL, NULL, NULL, 100)",
        "list_dead_letters(NULL, NULL, 'two', NULL, NULL, NULL, NULL, NULL, 100)",
        """list_workflows('{"status": "running"}', false, true, NULL, NULL, 100)""",
    )  # fmt: skip
    with psycopg.connect(database_url, autocommit=True, cursor_factory=psycopg.ClientCursor) as conn:
        conn.execute("SELECT durable.open_streams('{one,two}')")

        def read(look: str) -> int:
            conn.execute(f"SELECT * FROM durable.{look}".encode()).fetchall()
            plan = conn.execute(f"EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM durable.{look}".encode()).fetchall()
            numbers = re.findall(r"(?:hit|read)=(\d+)", next(str(row[0]) for row in plan if "Buffers" in str(row[0])))
            return sum(map(int, numbers))

        conn.execute(fill, {"many": 8_000, "two": 5})
        conn.execute("VACUUM ANALYZE durable.message, durable.dead_letter, durable.run")
        before = {look: read(look) for look in looks}
        conn.execute(fill, {"many": 64_000, "two": 0})
        conn.execute("VACUUM ANALYZE durable.message, durable.dead_letter, durable.run")
        for look in looks:
            assert read(look) < 1.5 * before[look] + 500, (look, before[look])
        found: list[Any] = conn.execute("SELECT what, count(*) FROM durable.find_stuck(500) GROUP BY 1").fetchall()
        assert dict(found) == {"ready": 6, "task_failure": 20, "dead": 2}
