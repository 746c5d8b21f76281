"""Dramatiq under a scope: retries, dead letters, results, transactions, groups."""

from tests.broker.test_groups import *
from tests.broker.test_retries import *
from tests.broker.test_transactions import *
