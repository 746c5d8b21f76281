-- What operators ask for: since when a worker runs what it holds, and which messages came back from the dead letters.

ALTER TABLE {schema}.worker
    ADD COLUMN running uuid[] NOT NULL DEFAULT '{}',               -- what runs for longer than a moment, as the worker tells
    ADD COLUMN running_since timestamptz[] NOT NULL DEFAULT '{}';  -- and since when, element by element

-- It came back and has not failed since: its next delivery counts its retries anew.
ALTER TABLE {schema}.message ADD COLUMN redriven boolean;
