"""``make bench``: what Dramatiq on Postgres costs, beside its floor and its peers in the same run.  See README.md."""
