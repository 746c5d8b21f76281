from __future__ import annotations

from pathlib import Path

import pytest

from dramatiq_durable.errors import NotConfigured
from dramatiq_durable.settings import Settings, check_url


def test_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()
    settings = Settings()
    assert (settings.url, settings.namespace, settings.import_) == (None, "durable", ())
    assert (settings.reclaim_delay, settings.poll_interval, settings.prepared_statements) == (30.0, 1.0, True)


def test_every_setting_is_read() -> None:
    environ = {
        "URL": " postgresql://localhost/shop ",
        "LISTEN_URL": "postgres://localhost:5433/shop",
        "NAMESPACE": "queues_2",
        "IMPORT": "shop.orders, shop.payments,",
        "EMBEDDED_DIR": "/srv/postgres",
        "RECLAIM_DELAY": "1m 30s",
        "POLL_INTERVAL": "0.25",
        "PREPARED_STATEMENTS": "Off",
        "TELEMETRY": "Debug",
    }
    assert Settings.from_env({f"DRAMATIQ_DURABLE_{name}": value for name, value in environ.items()}) == Settings(
        url="postgresql://localhost/shop",
        listen_url="postgres://localhost:5433/shop",
        namespace="queues_2",
        import_=("shop.orders", "shop.payments"),
        embedded_dir=Path("/srv/postgres"),
        reclaim_delay=90.0,
        poll_interval=0.25,
        prepared_statements=False,
        telemetry="debug",
    )


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    names = ("URL", "LISTEN_URL", "NAMESPACE", "IMPORT", "EMBEDDED_DIR", "RECLAIM_DELAY", "PREPARED_STATEMENTS")
    assert Settings.from_env({f"DRAMATIQ_DURABLE_{name}": " " for name in names}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "example"),
    [
        ("NAMESPACE", "Durable", "durable"),
        ("NAMESPACE", "pg_durable", "durable"),
        ("NAMESPACE", "a" * 41, "durable"),
        ("NAMESPACE", "x; DROP SCHEMA public", "durable"),
        ("IMPORT", "shop/orders.py", "shop.orders,shop.payments"),
        ("RECLAIM_DELAY", "soon", "30s"),
        ("RECLAIM_DELAY", "0", "30s"),
        ("POLL_INTERVAL", "-1", "0.5"),
        ("POLL_INTERVAL", "nan", "0.5"),
        ("PREPARED_STATEMENTS", "maybe", "off"),
        ("TELEMETRY", "trace", "debug"),
    ],
)
def test_a_bad_value_is_named_with_its_variable_and_an_example(name: str, value: str, example: str) -> None:
    with pytest.raises(NotConfigured) as caught:
        Settings.from_env({f"DRAMATIQ_DURABLE_{name}": value})
    message = str(caught.value)
    assert f"DRAMATIQ_DURABLE_{name}={value!r}" in message
    assert message.endswith(f"DRAMATIQ_DURABLE_{name}={example}")
    assert ".." not in message


def test_a_misspelt_setting_is_shown_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    environ = {
        "ULR": "postgresql://me:secret@localhost/shop",
        "COLOUR": "red",
        "TEST_PG": "",
        "URL": "",
        "APP": "shop",
        "UI_TOKEN": "secret",
    }
    assert Settings.from_env({f"DRAMATIQ_DURABLE_{name}": value for name, value in environ.items()}) == Settings()
    colour, url = caplog.messages
    assert "DRAMATIQ_DURABLE_COLOUR is no setting" in colour
    assert "RECLAIM_DELAY" in colour
    assert "DRAMATIQ_DURABLE_ULR is no setting" in url
    assert "Did you mean DRAMATIQ_DURABLE_URL?" in url
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://",
        "postgresql:///shop",
        "postgres://user@localhost/shop",
        "PostgreSQL://localhost/shop",
        "postgresql://user:p%40ss%25@localhost:5432/shop?sslmode=require",
        "postgresql://[::1]:5432/shop",
        "postgresql://one:5432,two,three:5434/shop?target_session_attrs=read-write",
        "postgresql://postgres@/postgres?host=%2Fvar%2Frun%2Fsome%2C&port=5432",
    ],
)
def test_good_urls(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "empty"),
        ("s3cret", "does not start with postgresql://"),
        ("host=localhost password=s3cret", "does not start with postgresql://"),
        ("redis://:s3cret@localhost:6379/0", "starts with redis://"),
        ("s3cret@host://x", "starts otherwise"),
        ("postgresql+psycopg://user:s3cret@localhost/shop", "leave out the driver"),
        ("postgresql://user:s3cret@local host/shop", "blank"),
        ("postgresql://user:s3cret\n@localhost/shop", "blank or a control character"),
        ("postgresql://user:s3cret%@localhost/shop", "%25"),
        ("postgresql://user:s3cret%00@localhost/shop", "%25"),
        ("postgresql://user:p@s3cret@localhost/shop", "more than one @"),
        ("postgresql://user:s3cret/x@localhost/shop", "percent-encode"),
        ("postgresql://user:s3cret#x@localhost/shop", "percent-encode"),
        ("postgresql://localhost:99999/shop", "port"),
        ("postgresql://localhost:0/shop", "port"),
    ],
)
def test_bad_urls_are_refused_without_a_word_of_the_password(url: str, why: str) -> None:
    with pytest.raises(NotConfigured) as caught:
        Settings.from_env({"DRAMATIQ_DURABLE_LISTEN_URL": url}) if url else check_url(url, name="LISTEN_URL")
    message = str(caught.value)
    assert "LISTEN_URL is no URL" in message
    assert why in message
    assert "postgresql://user:password@localhost:5432/database" in message
    assert "s3cret" not in message
