"""Attacks on the procedures by a login that was granted only so much."""
