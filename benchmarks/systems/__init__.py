"""One module for each measured system.  They run with that system's own Python: nothing of ours is imported here."""
