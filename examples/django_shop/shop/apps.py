import dramatiq
from django.apps import AppConfig
from django.conf import settings
from django.db import close_old_connections

import dramatiq_durable as durable


class Connections(dramatiq.Middleware):
    """Django's connections in a worker's threads, as requests have them: none outlives its time, or its server."""

    def before_process_message(self, broker, message):
        close_old_connections()

    def after_process_message(self, broker, message, *, result=None, exception=None):
        close_old_connections()


class ShopConfig(AppConfig):
    name = "shop"

    def ready(self):
        broker = durable.DurableBroker(settings.DRAMATIQ_DURABLE_URL)
        broker.add_middleware(Connections())
        dramatiq.set_broker(broker)
        from . import actors  # noqa: F401 - after the broker is set
