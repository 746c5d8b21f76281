"""The pytest plugin, as an application's tests use it: in a pytest of their own."""

from __future__ import annotations

import tomllib

import pytest

from tests.support import ROOT

pytest_plugins = ["pytester"]

SHOP = """
import dramatiq
import dramatiq_durable as durable

broker = durable.DurableBroker("postgresql://nobody@127.0.0.1:1/nothing")
dramatiq.set_broker(broker)


@durable.activity(queue_name="payments")
def charge(cents: int) -> str:
    return f"receipt-{cents}"


@durable.workflow(queue_name="orders")
async def order(cents: int) -> str:
    await durable.sleep(0.01)
    return await charge.execute(cents)
"""

TESTS = """
import threading

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
import shop


def test_in_memory(durable_environment):
    assert durable_environment.run(shop.order, 500) == "receipt-500"


@pytest.mark.parametrize("n", [1, 2])
def test_on_postgres(durable_broker, durable_worker, n):
    assert dramatiq.get_broker() is durable_broker is not shop.broker
    # A database of its own for each test.
    assert shop.order.options(workflow_id="the-order").start(n).result(timeout=20) == f"receipt-{n}"
    assert shop.charge.send(n).queue_name == "payments"

    @durable.activity
    def later(n: int) -> int:
        return n + 1

    @durable.workflow
    async def declared_here(n: int) -> int:
        return await later.execute(n)

    assert declared_here.start(n).result(timeout=20) == n + 1
    assert durable.get_handle("the-order").status() == "completed"


def test_everything_is_as_before():
    assert dramatiq.get_broker() is shop.broker
    assert shop.charge.actor.broker is shop.broker
    assert shop.order.broker is shop.broker
    assert not [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run the files that were made; the plugin is named, because a checkout may not be installed."""
    pytester._monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ("-p", "pytest_dramatiq_durable", "-p", "no:cacheprovider", "-W", "error", *arguments)
    return pytester.runpytest_subprocess(*command, timeout=100)


def test_the_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(shop=SHOP, test_shop=TESTS)
    run(pytester).assert_outcomes(passed=4)


def test_in_workers_of_xdist(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(shop=SHOP, test_shop=TESTS)
    run(pytester, "-n", "2").assert_outcomes(passed=4)


def test_a_failing_test_leaves_the_next_one_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        shop=SHOP,
        test_shop="""
            import shop, dramatiq_durable as durable

            def test_fails(durable_worker):
                shop.order.options(workflow_id="one").start(1)
                raise AssertionError("as asked")

            def test_works(durable_worker):
                assert shop.order.options(workflow_id="one").start(2).result(timeout=20) == "receipt-2"
        """,
    )
    run(pytester).assert_outcomes(passed=1, failed=1)


def test_nothing_is_imported_for_those_who_do_not_use_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_nothing():
            heavy = {"dramatiq_durable", "dramatiq", "psycopg", "prometheus_client", "click"}
            assert not heavy & set(sys.modules)
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_pytest_finds_it_where_the_package_is_installed() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    # The name of the module, so that naming it with -p as well does no harm.
    assert points == {"pytest_dramatiq_durable": "pytest_dramatiq_durable"}
