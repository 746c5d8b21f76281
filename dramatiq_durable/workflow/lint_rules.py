"""What the lint looks for, by full names, and what to do instead."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """What something does, and what to do instead."""

    what: str
    instead: str


_ACTIVITY = "make it an activity and call it with `await activity.execute(...)`"
_CLOCK = Rule("reads the clock", "use `durable.now()`")
_TIMER = Rule("reads a clock", "use `durable.now()`, or `asyncio.get_running_loop().time()`")
_RANDOM = Rule("draws random numbers", "use `durable.random()`")
_UUID = Rule("makes a random uuid", "use `durable.uuid4()` or `durable.uuid7()`")
_SECRET = Rule(
    "draws secret random numbers", "use `durable.random()`, `await durable.side_effect(...)`, or an activity"
)
_THREAD = Rule("starts threads or processes", f"use `asyncio.create_task(...)`, or {_ACTIVITY}")
_PROCESS = Rule("starts a process", _ACTIVITY)
_FILES = Rule("touches the file system", _ACTIVITY)
_NETWORK = Rule("does network I/O", _ACTIVITY)
_DATABASE = Rule("talks to a database", _ACTIVITY)
_BLOCKS = Rule("waits for other threads", "use its namesake of asyncio: `asyncio.Event`, `asyncio.Queue`, ...")
_LOOP = Rule("needs another event loop", "use plain asyncio: the workflow runs on a loop of its own")
_BARE = Rule(
    "has an order of chance in sets",
    "use `asyncio.create_task(...)`, or `asyncio.get_running_loop().create_future()`",
)
_PROCESS_OWN = Rule("differs in every process", "use something that the arguments determine")


def _all(rule: Rule, prefix: str, names: str) -> dict[str, Rule]:
    return {f"{prefix}.{name}": rule for name in names.split()}


#: Wherever they are named, called or not.
ANYWHERE: dict[str, Rule] = {
    **_all(_CLOCK, "time", "time time_ns"),
    **_all(_CLOCK, "datetime.datetime", "now utcnow today"),
    **_all(_CLOCK, "datetime.date", "today"),
    **_all(_CLOCK, "django.utils.timezone", "now localtime localdate"),
    **_all(
        _TIMER,
        "time",
        "monotonic monotonic_ns perf_counter perf_counter_ns process_time process_time_ns thread_time thread_time_ns "
        "clock_gettime clock_gettime_ns",
    ),
    "time.sleep": Rule("blocks", "use `await asyncio.sleep(...)` or `await durable.sleep(...)`"),
    **_all(
        _RANDOM,
        "random",
        "random randint randrange choice choices shuffle sample uniform triangular betavariate expovariate "
        "gammavariate gauss lognormvariate normalvariate vonmisesvariate paretovariate weibullvariate binomialvariate "
        "getrandbits randbytes seed",
    ),
    **_all(_UUID, "uuid", "uuid1 uuid4 uuid6 uuid7"),
    **_all(_SECRET, "os", "urandom getrandom"),
    "random.SystemRandom": _SECRET,
    **_all(_PROCESS, "os", "system popen fork forkpty posix_spawn posix_spawnp startfile"),
    **_all(
        _FILES,
        "os",
        "open listdir scandir walk mkdir makedirs remove unlink rename renames replace rmdir removedirs link symlink "
        "truncate chmod chown utime stat lstat read write",
    ),
    **_all(_FILES, "os.path", "exists isfile isdir getsize getmtime getctime getatime"),
    **_all(_FILES, "builtins", "open"),
    **_all(_FILES, "io", "open FileIO"),
    "builtins.input": Rule("asks on the terminal", "wait for a signal: `await durable.wait_for_signal(...)`"),
    **_all(_NETWORK, "asyncio", "open_connection open_unix_connection start_server start_unix_server"),
    **_all(_PROCESS, "asyncio", "create_subprocess_exec create_subprocess_shell"),
    **_all(_THREAD, "asyncio", "to_thread"),
    **_all(_LOOP, "asyncio", "run new_event_loop run_coroutine_threadsafe Runner eager_task_factory"),
}

#: Where they are called.
CALLS: dict[str, Rule] = {
    **_all(_PROCESS_OWN, "builtins", "id hash"),
    **_all(_BARE, "asyncio", "Task Future"),
    **_all(_BLOCKS, "threading", "Event Condition Semaphore BoundedSemaphore Barrier"),
    **_all(_BLOCKS, "queue", "Queue LifoQueue PriorityQueue SimpleQueue"),
    **_all(_THREAD, "threading", "Thread Timer"),
    **_all(_PROCESS, "os", "execl execle execlp execv execve execvp spawnl spawnle spawnlp spawnv spawnve spawnvp"),
    "random.Random()": _RANDOM,
}

#: Everything that is called out of these packages, but for their exceptions.
FAMILIES: dict[str, Rule] = {
    **dict.fromkeys(("secrets", "numpy.random.SeedSequence"), _SECRET),
    "numpy.random": _RANDOM,
    **dict.fromkeys(("concurrent.futures", "multiprocessing", "_thread", "joblib"), _THREAD),
    **dict.fromkeys(("subprocess", "pexpect", "sh"), _PROCESS),
    **dict.fromkeys(("shutil", "tempfile", "glob", "fileinput", "aiofiles"), _FILES),
    **dict.fromkeys(
        (
            *("socket", "socketserver", "ssl", "select", "selectors"),
            *("http.client", "http.server", "urllib.request", "urllib3", "ftplib", "smtplib", "imaplib", "poplib"),
            *("requests", "httpx", "aiohttp", "websockets", "websocket", "paramiko", "asyncssh", "grpc", "pycurl"),
            *("boto3", "aioboto3", "aiobotocore", "botocore", "google.cloud", "azure", "stripe", "twilio", "slack_sdk"),
            *("openai", "anthropic", "kafka", "aiokafka", "confluent_kafka", "pika", "aio_pika", "aiosmtplib"),
        ),
        _NETWORK,
    ),
    **dict.fromkeys(
        (
            *("psycopg", "psycopg2", "asyncpg", "sqlite3", "aiosqlite", "pymysql", "aiomysql", "MySQLdb", "oracledb"),
            *("redis", "aioredis", "pymongo", "motor", "elasticsearch", "cassandra", "django.db"),
            *("sqlalchemy.create_engine", "sqlalchemy.ext.asyncio", "sqlalchemy.orm.Session", "sqlalchemy.orm"),
        ),
        _DATABASE,
    ),
    **dict.fromkeys(("anyio", "trio", "gevent", "eventlet"), _LOOP),
}

#: Methods with telling names, whatever they are called on.
METHODS: dict[str, Rule] = {
    **dict.fromkeys(["read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "rglob"], _FILES),
    **dict.fromkeys(("run_in_executor", "set_default_executor"), _THREAD),
    **dict.fromkeys(
        ["call_soon_threadsafe", "add_signal_handler"], Rule("comes from outside of the run", "send it a signal")
    ),
    **dict.fromkeys(
        [
            "add_reader",
            "add_writer",
            "create_connection",
            "create_server",
            "create_unix_connection",
            "create_datagram_endpoint",
            "sock_recv",
            "sock_sendall",
            "sock_connect",
            "sock_accept",
            "getaddrinfo",
        ],
        _NETWORK,
    ),
    **dict.fromkeys(["subprocess_exec", "subprocess_shell"], _PROCESS),
    "run_until_complete": _LOOP,
}

#: What goes through its arguments in the order that they have.
SET_CONSUMERS = frozenset(
    f"builtins.{name}" for name in ("list", "tuple", "enumerate", "iter", "map", "zip", "filter", "next", "reversed")
)
