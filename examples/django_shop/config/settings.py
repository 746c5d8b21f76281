import os

from psycopg.conninfo import conninfo_to_dict

# The shop's tables and its messages are in one database: only so can they share a transaction.
DRAMATIQ_DURABLE_URL = os.environ["DRAMATIQ_DURABLE_URL"]

_url = conninfo_to_dict(DRAMATIQ_DURABLE_URL)

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url["dbname"],
        "USER": _url.get("user", ""),
        "PASSWORD": _url.get("password", ""),
        "HOST": _url.get("host", ""),
        "PORT": str(_url.get("port", "")),
    }
}

SECRET_KEY = os.environ.get("SECRET_KEY", "only-for-this-example")
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "config.urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
