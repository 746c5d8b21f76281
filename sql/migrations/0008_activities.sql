-- Activities with limits, heartbeats, or an end that comes from elsewhere; and those that were cancelled while they ran.

-- It has a row in activity.
ALTER TABLE {schema}.message ADD COLUMN watched boolean;

-- What is known of an activity beside its message: a row only where there is something to know.  Whoever changes one has
-- its message locked.
CREATE TABLE {schema}.activity (
    run_id uuid NOT NULL,
    seq int NOT NULL,                          -- the command that scheduled it
    scheduled_at timestamptz NOT NULL,         -- from when schedule_to_close counts
    -- Its limits, in milliseconds.  What keeps them is a message of kind 'd' on the run's stream, due with the next one.
    start_to_close bigint,
    schedule_to_start bigint,
    schedule_to_close bigint,
    heartbeat bigint,
    -- How an attempt that a limit ended is tried again; milliseconds.
    retry_initial bigint NOT NULL DEFAULT 1000,
    retry_coefficient float8 NOT NULL DEFAULT 2,
    retry_maximum bigint,
    retry_attempts int,
    -- The attempt that was begun last: it runs as long as the message is under this lease.
    lease uuid,
    started_at timestamptz,
    beat_at timestamptz,
    details bytea CHECK (octet_length(details) <= 16777216),  -- of the last heartbeat
    -- The digest of the token that ends it, and the attempt that asked for one.
    token bytea,
    token_attempt int,
    PRIMARY KEY (run_id, seq)
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- Activities that were cancelled while a worker had them.  Rows are only added, so that nobody waits for another.
CREATE TABLE {schema}.activity_cancel (
    run_id uuid NOT NULL,
    seq int NOT NULL,
    PRIMARY KEY (run_id, seq)
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
