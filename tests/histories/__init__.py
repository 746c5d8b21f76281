"""Histories that were recorded once and are replayed for ever; README.md says how one is added."""
