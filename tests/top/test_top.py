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

    def open_screen(url: str = database_url, **size: Any) -> Screen:
        screens.append(Screen(*TOP, url, "top", "--interval", "200ms", **size))
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


def test_what_cannot_be(database_url: str) -> None:
    def refused(*arguments: str, url: str = database_url) -> str:
        done = CliRunner().invoke(main, ["--url", url, "top", *arguments])
        assert done.exit_code != 0
        return done.output

    assert "--json goes with --once" in refused("--json")
    assert "--once prints one frame" in refused()
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
    screen.press("q4")
    screen.press("/order-17\r\r")
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
    screen.shows("could not do 2")
    assert re.search(r"! +dead: rejected +mails +2 ", screen.text)
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


def test_a_look_for_what_is_stuck_is_bounded(database_url: str) -> None:
    fill = """
    INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)
    SELECT gen_random_uuid(), 1 + n % 2, n % 3, now() + interval '1 hour' * (n % 5 - 2), now(), 'a', '{}'
    FROM generate_series(1, %s) n;
    INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, task_failure)
    SELECT gen_random_uuid(), gen_random_uuid()::text, 1, 'x', CASE WHEN n % 4 = 0 THEN 'running' ELSE 'completed' END,
           now(), 1, CASE WHEN n % 8 = 0 THEN 'no' END
    FROM generate_series(1, %s) n;
    """
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{one,two}')")

        def read() -> int:
            conn.execute("SELECT * FROM durable.find_stuck(500)").fetchall()
            plan = conn.execute("EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM durable.find_stuck(500)").fetchall()
            numbers = re.findall(r"(?:hit|read)=(\d+)", next(str(row[0]) for row in plan if "Buffers" in str(row[0])))
            return sum(map(int, numbers))

        conn.execute(fill.replace("%s", "8000").encode())
        before = read()
        conn.execute(fill.replace("%s", "64000").encode())
        assert read() < 1.5 * before + 500
        found: list[Any] = conn.execute("SELECT what, count(*) FROM durable.find_stuck(500) GROUP BY 1").fetchall()
        assert dict(found) == {"ready": 6, "task_failure": 20}
