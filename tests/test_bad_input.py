"""Bad input gets a clear error of our own that says what to do, before anything is stored, and disturbs nobody else."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.delivery import MAX_PAYLOAD
from tests.support import wait_until


@pytest.fixture
def connect() -> Iterator[Callable[..., durable.DurableBroker]]:
    """Makes brokers with one actor, `plain`, on the queue `plain`."""
    made: list[durable.DurableBroker] = []

    def connect(url: str, **options: Any) -> durable.DurableBroker:
        broker = durable.DurableBroker(url, **options)
        made.append(broker)

        @dramatiq.actor(broker=broker, queue_name="plain")
        def plain(*args: Any, **kwargs: Any) -> None: ...

        return broker

    yield connect
    for broker in made:
        broker.close()


@pytest.fixture
def broker(database_url: str, connect: Callable[..., durable.DurableBroker]) -> durable.DurableBroker:
    return connect(database_url)


@pytest.fixture
def start_worker() -> Iterator[Callable[[durable.DurableBroker], None]]:
    workers: list[dramatiq.Worker] = []

    def start(broker: durable.DurableBroker) -> None:
        workers.append(dramatiq.Worker(broker, worker_timeout=50, worker_threads=2))
        workers[-1].start()

    yield start
    for worker in workers:
        worker.stop(timeout=5000)


def send(broker: durable.DurableBroker, *args: Any, **kwargs: Any) -> Any:
    return broker.get_actor("plain").send(*args, **kwargs)


def count(url: str, what: str = "message") -> int:
    with psycopg.connect(url, autocommit=True) as conn:
        return int(conn.execute(f"SELECT count(*) FROM durable.{what}".encode()).fetchall()[0][0])


# --- the database -------------------------------------------------------------------------------------------


class FakeServer:
    """Answers every log-in with one error."""

    def __init__(self, code: str, text: str) -> None:
        fields = [b"SFATAL", b"VFATAL", b"C" + code.encode(), b"M" + text.encode(), b""]
        body = b"\0".join(fields) + b"\0"
        self._answer = b"E" + struct.pack(">i", len(body) + 4) + body
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            conn, _ = self._socket.accept()
            with conn:
                while head := conn.recv(8):
                    length, code = struct.unpack(">ii", head)
                    if code == 0:  # what close() sends
                        return
                    if code in (80877103, 80877104):  # encryption: none
                        conn.sendall(b"N")
                        continue
                    conn.recv(length - 8)
                    conn.sendall(self._answer)
                    break

    def close(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as conn:
            conn.sendall(struct.pack(">ii", 8, 0))
        self._thread.join(5)
        self._socket.close()


@pytest.fixture
def fake_server() -> Iterator[Callable[[str, str], FakeServer]]:
    made: list[FakeServer] = []

    def make(code: str, text: str) -> FakeServer:
        made.append(FakeServer(code, text))
        return made[-1]

    yield make
    for server in made:
        server.close()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def test_an_unreachable_database(connect: Callable[..., durable.DurableBroker]) -> None:
    broker = connect(f"postgresql://me:s3cret@127.0.0.1:{unused_port()}/shop")
    began = time.monotonic()
    with pytest.raises(durable.DatabaseUnavailable) as caught:
        send(broker)
    assert time.monotonic() - began < 20
    text = str(caught.value)
    assert "DRAMATIQ_DURABLE_URL" in text
    assert "127.0.0.1" in text
    assert "s3cret" not in text
    assert text.count("?") == 1  # libpq asks nearly the same as we do
    assert isinstance(caught.value, dramatiq.errors.BrokerConnectionError)  # Dramatiq's workers retry on it


@pytest.mark.parametrize(
    ("code", "text", "error", "advice"),
    [
        ("28P01", 'password authentication failed for user "me"', durable.NotConfigured, "user and password"),
        ("28000", 'role "me" does not exist', durable.NotConfigured, "role"),
        ("3D000", 'database "shop" does not exist', durable.NotConfigured, "createdb"),
        ("57P03", "the database system is starting up", durable.DatabaseUnavailable, "starting up"),
        ("53300", "sorry, too many clients already", durable.DatabaseUnavailable, "too many clients"),
    ],
)
def test_a_refused_login(
    connect: Callable[..., durable.DurableBroker], fake_server: Any, code: str, text: str, error: Any, advice: str
) -> None:
    server = fake_server(code, text)
    broker = connect(f"postgresql://me:s3cret@127.0.0.1:{server.port}/shop")
    with pytest.raises(error) as caught:
        send(broker)
    assert type(caught.value) is error
    assert advice in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert f"127.0.0.1:{server.port}/shop" in str(caught.value)


def test_an_unknown_host(connect: Callable[..., durable.DurableBroker]) -> None:
    with pytest.raises((durable.NotConfigured, durable.DatabaseUnavailable), match=r"nowhere\.invalid"):
        send(connect("postgresql://me@nowhere.invalid/shop"))


def test_a_missing_database(database_url: str, connect: Callable[..., durable.DurableBroker]) -> None:
    missing = urlsplit(database_url)._replace(path="/there_is_none").geturl()
    with pytest.raises(durable.NotConfigured, match="createdb"):
        send(connect(missing))


def test_a_missing_schema(empty_database_url: str, connect: Callable[..., durable.DurableBroker]) -> None:
    broker = connect(empty_database_url)
    with pytest.raises(durable.SchemaOutOfDate, match="dramatiq-durable migrate"):
        send(broker)
    # Once it was migrated, the same broker works.
    from dramatiq_durable.migrate import migrate

    migrate(empty_database_url)
    send(broker)
    assert count(empty_database_url) == 1


def test_another_namespace_is_missing_too(database_url: str, connect: Callable[..., durable.DurableBroker]) -> None:
    with pytest.raises(durable.SchemaOutOfDate, match="elsewhere"):
        send(connect(database_url, namespace="elsewhere"))


@pytest.mark.parametrize("url", ["", "localhost", "mysql://x/y", "postgresql://a b/c", "postgresql://u:s3cret@h:x/d"])
def test_a_malformed_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(durable.NotConfigured, match="postgresql://") as caught:
        durable.DurableBroker(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("namespace", ["with space", "x" * 100, 'a"b', "pg_mine", "Upper"])
def test_a_malformed_namespace_is_refused_at_once(namespace: str) -> None:
    with pytest.raises((durable.DurableError, ValueError), match=r".{15,}"):
        durable.DurableBroker("postgresql://localhost/x", namespace=namespace)


@pytest.mark.parametrize("number", [0, -1, "3", 1.5, None])
def test_a_malformed_reclaim_count(number: Any) -> None:
    with pytest.raises(ValueError, match="reclaim_count"):
        durable.DurableBroker("postgresql://localhost/x", reclaim_count=number)


# --- messages -----------------------------------------------------------------------------------------------


class Opaque:
    pass


@pytest.mark.parametrize(
    ("args", "kwargs", "place"),
    [
        ((1, Opaque()), {}, "argument 2 is of type Opaque"),
        ((), {"order": {1, 2}}, "argument 'order' is of type set"),
        ((b"bytes",), {}, "argument 1 is of type bytes"),
        (({(1, 2): 3},), {}, "argument 1 is of type dict"),
    ],
    ids=["object", "set", "bytes", "key"],
)
def test_arguments_that_json_cannot_carry(
    broker: durable.DurableBroker, database_url: str, args: Any, kwargs: Any, place: str
) -> None:
    send(broker, "before")
    with pytest.raises(durable.NotEncodable) as caught:
        send(broker, *args, **kwargs)
    assert place in str(caught.value)
    assert "'plain'" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    send(broker, "after")
    assert count(database_url) == 2


def test_an_argument_that_contains_itself(broker: durable.DurableBroker, database_url: str) -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    for value in (circle, deep):
        with pytest.raises(durable.NotEncodable, match="argument 1"):
            send(broker, value)
    while deep:  # its own end would recurse as deep
        deep = deep.pop()
    assert count(database_url) == 0


@pytest.mark.parametrize("name", ["", "with a \0", "x" * 300, "x" * 201])
def test_names_that_postgres_or_we_refuse(broker: durable.DurableBroker, database_url: str, name: str) -> None:
    for declare in (
        lambda: broker.declare_queue(name),
        # An empty name stands for the function's.
        lambda: dramatiq.actor(lambda: None, actor_name=name or "\0", broker=broker),
        lambda: dramatiq.actor(lambda: None, actor_name="fine", queue_name=name, broker=broker),
        lambda: durable.activity(actor_name=name or "\0", broker=broker)(lambda: None),
        lambda: durable.activity_stub(name),
    ):
        with pytest.raises(ValueError, match=r"1 to 200 characters|queue name|[Qq]ueue names") as caught:
            declare()
        assert len(str(caught.value)) < 400
    message = broker.get_actor("plain").message()
    with pytest.raises(durable.InvalidName, match="1 to 200"):
        broker.enqueue(message.copy(actor_name=name))
    with pytest.raises(dramatiq.errors.QueueNotFound):
        broker.enqueue(message.copy(queue_name=name))
    send(broker)
    assert count(database_url) == 1


def test_names_of_200_characters_are_fine(broker: durable.DurableBroker, database_url: str) -> None:
    name = "ä" * 200
    actor = dramatiq.actor(lambda: None, actor_name=name, queue_name="q" * 200, broker=broker)
    actor.send()
    assert count(database_url) == 1


def test_a_nul_in_an_argument_is_data(
    broker: durable.DurableBroker, start_worker: Callable[[durable.DurableBroker], None]
) -> None:
    got: list[str] = []

    @dramatiq.actor(broker=broker)
    def take(text: str) -> None:
        got.append(text)

    @durable.workflow(broker=broker)
    async def flow(text: str) -> str:
        return text + "\0"

    start_worker(broker)
    take.send("a\0b")
    assert flow.start("\0").result(timeout=15) == "\0\0"
    assert wait_until(lambda: got) == ["a\0b"]


def test_a_payload_over_the_cap(broker: durable.DurableBroker, database_url: str) -> None:
    with pytest.raises(durable.PayloadTooLarge, match="send a reference"):
        send(broker, "x" * MAX_PAYLOAD)
    send(broker, "x" * (MAX_PAYLOAD - 300))
    assert count(database_url) == 1


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), 10**15, "soon"])
def test_a_delay_that_makes_no_sense(broker: durable.DurableBroker, database_url: str, delay: Any) -> None:
    with pytest.raises(ValueError, match="a delay is between"):
        broker.get_actor("plain").send_with_options(delay=delay)
    send(broker)
    assert count(database_url) == 1


def test_an_undeclared_queue(broker: durable.DurableBroker) -> None:
    message = broker.get_actor("plain").message()
    with pytest.raises(dramatiq.errors.QueueNotFound):
        broker.enqueue(message.copy(queue_name="undeclared"))


def test_bad_messages_of_many_threads_disturb_no_good_ones(broker: durable.DurableBroker, database_url: str) -> None:
    errors: list[Exception] = []

    def work(number: int) -> None:
        for n in range(20):
            try:
                send(broker, Opaque() if (n + number) % 3 == 0 else n)
            except durable.NotEncodable as e:
                errors.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 60
    assert count(database_url) == 120


# --- workflows ----------------------------------------------------------------------------------------------


def test_a_workflow_that_is_not_async(broker: durable.DurableBroker) -> None:
    with pytest.raises(durable.InvalidDefinition, match="async def order") as caught:

        @durable.workflow(broker=broker)  # type: ignore[type-var]
        def order() -> None: ...

    assert isinstance(caught.value, TypeError)
    assert "order" not in broker.actors


def test_a_workflow_on_another_broker() -> None:
    from dramatiq.brokers.stub import StubBroker

    with pytest.raises(durable.NotConfigured, match="DurableBroker"):

        @durable.workflow(broker=StubBroker())
        async def order() -> None: ...


def test_arguments_of_a_workflow_that_json_cannot_carry(broker: durable.DurableBroker, database_url: str) -> None:
    @durable.workflow(broker=broker)
    async def flow(value: Any) -> None: ...

    with pytest.raises(durable.NotEncodable, match="flow"):
        flow.start(Opaque())
    with pytest.raises(durable.PayloadTooLarge):
        flow.start("x" * MAX_PAYLOAD)
    with pytest.raises(durable.InvalidName):
        flow.options(workflow_id="x" * 300)
    with pytest.raises(durable.InvalidName):
        flow.options(workflow_id="with a \0").start(1)
    assert count(database_url, "run") == 0


def blocking_socket() -> None:
    socket.create_connection(("127.0.0.1", 1))


def blocking_sleep() -> None:
    time.sleep(0.01)


def a_thread() -> None:
    threading.Thread(target=print).start()


def a_file() -> None:
    with open(__file__) as f:
        f.read()


def an_executor() -> Any:
    return asyncio.get_running_loop().run_in_executor(None, print)


def a_send() -> None:
    plain = dramatiq.broker.get_broker().get_actor("plain")
    plain.send(1)


@pytest.mark.parametrize("forbidden", [blocking_socket, blocking_sleep, a_thread, a_file, an_executor, a_send])
def test_what_cannot_be_replayed_is_refused_in_a_workflow(
    broker: durable.DurableBroker,
    start_worker: Callable[[durable.DurableBroker], None],
    database_url: str,
    forbidden: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dramatiq.broker, "global_broker", broker)

    @durable.workflow(broker=broker)
    async def bad() -> None:
        forbidden()

    @durable.workflow(broker=broker)
    async def good() -> str:
        await durable.sleep(0.05)
        return "good"

    handles = [good.start() for _ in range(3)]
    wrong = bad.start()
    start_worker(broker)
    with pytest.raises(durable.WorkflowFailed) as caught:
        wrong.result(timeout=15)
    assert caught.value.type == "ForbiddenInWorkflow"
    assert "activity" in str(caught.value) or "await" in str(caught.value)  # what to do instead
    assert [h.result(timeout=15) for h in handles] == ["good"] * 3
    assert count(database_url) == 0


def test_a_run_that_nobody_has(broker: durable.DurableBroker) -> None:
    for handle in (
        durable.get_handle("nobody", broker=broker),
        durable.get_handle("nobody", "00000000-0000-0000-0000-000000000000", broker=broker),
    ):
        for call in (handle.status, handle.describe, lambda h=handle: h.signal("x"), handle.cancel, handle.history):
            with pytest.raises(durable.WorkflowNotFound):
                call()  # type: ignore[operator]
    with pytest.raises(durable.InvalidName):
        durable.get_handle("x" * 500, broker=broker)
