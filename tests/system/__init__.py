"""Tests that need a program from the system's packages; ``make test-system`` runs them."""
