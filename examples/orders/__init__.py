"""The demo: orders that survive the death of a worker and a crash of Postgres."""
