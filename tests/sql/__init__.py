"""The SQL procedures, called directly."""
