"""Workflows under a scope: runs, state."""

from tests.workflow.test_runs import *
