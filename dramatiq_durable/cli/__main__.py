"""``python -m dramatiq_durable.cli`` is ``dramatiq-durable``."""

from . import main

main(prog_name="dramatiq-durable")
