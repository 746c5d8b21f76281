-- Schedules: what is fired at the times of a cron expression.

-- A schedule that is not paused has one tick: a message of kind 'c' on the stream of what it fires, due at the next due
-- time, whose id is the schedule's own (of version 8: no sender can take it).
CREATE TABLE {schema}.schedule (
    schedule_id uuid PRIMARY KEY DEFAULT overlay(gen_random_uuid()::text PLACING '8' FROM 15)::uuid,
    -- As with limiters: administrators share space 0, any other principal has its own.
    space int NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 150),
    revision int NOT NULL DEFAULT 1,           -- grows with every change of the definition
    stream_id int NOT NULL,
    kind "char" NOT NULL CHECK (kind IN ('m', 's')),  -- what it fires: m: a message; s: a run
    actor text NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
    priority int NOT NULL,
    template bytea NOT NULL CHECK (octet_length(template) <= 16777216),  -- the encoded message, or the runs' input
    memo json CHECK (octet_length(memo::text) <= 16777216),
    cron text NOT NULL CHECK (length(cron) BETWEEN 1 AND 1000),
    timezone text NOT NULL CHECK (length(timezone) BETWEEN 1 AND 200),
    -- Milliseconds: a due time that is older than this is missed.
    catch_up bigint NOT NULL CHECK (catch_up BETWEEN 0 AND 31622400000000),
    overlap text NOT NULL CHECK (overlap IN ('skip', 'buffer_one', 'allow')),
    paused boolean NOT NULL,
    failure text,                              -- why the database has paused it
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_to timestamptz NOT NULL DEFAULT clock_timestamp(),  -- due times up to this one have been dealt with
    waiting timestamptz,                       -- buffer_one: the due time that waits for the end of what is live
    live uuid[] NOT NULL DEFAULT '{}',         -- what it fired last, and before that what may not have ended yet
    fired bigint NOT NULL DEFAULT 0,
    skipped bigint NOT NULL DEFAULT 0,         -- due times that what was live stood in the way of
    missed bigint NOT NULL DEFAULT 0,          -- due times that were found too late
    last_due timestamptz,                      -- the due time that was fired last, and what it became
    last_id uuid,
    UNIQUE (name, space)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_cost_delay = 0);
