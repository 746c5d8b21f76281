-- Housekeeping: what can never be settled comes to an end, and what is over is found where it lies.

-- How often in a row its end could not be stored.
ALTER TABLE {schema}.message ADD COLUMN unsettled smallint;

-- A poison letter's attempt is the one that killed its worker, not the next.
UPDATE {schema}.dead_letter SET attempt = attempt - 1 WHERE reason = 'poison' AND attempt > 1;

-- Which runs closed long ago.  No step of a run but its last changes this column.
CREATE INDEX run_by_close ON {schema}.run (closed_at, run_id) WHERE closed_at IS NOT NULL;
