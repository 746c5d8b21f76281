"""Moving in: the messages that wait in another of Dramatiq's brokers go to our streams.

`importer` moves; `redis`, `rabbitmq` and `postgres` know where the other brokers keep what.  Their client libraries are
extras (``pip install 'dramatiq-durable[import]'``), and are imported when they are used.
"""
