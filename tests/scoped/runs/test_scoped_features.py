"""Workflows under a scope: human steps, and what other systems' users expect."""

from tests.scenarios_other.test_others_state import *
from tests.workflow.test_escalations import *
