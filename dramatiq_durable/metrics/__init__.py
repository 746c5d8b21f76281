"""What this process counts and measures, and what the database can say of a namespace.

`catalogue` names everything; `recorder` counts, in plain memory; `prometheus`, `multiprocess` and `otel` show what was
counted; `gauges` asks the database, for the `exporter`.
"""
