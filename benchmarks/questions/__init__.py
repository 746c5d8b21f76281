"""One module for each question; each has ``measure(bench)``, which shows a table."""
