-- Workflows: the runs, their history, what is on its way to them, and who waits for their end.

CREATE TABLE {schema}.run (
    run_id uuid PRIMARY KEY,
    workflow_id text NOT NULL CHECK (length(workflow_id) BETWEEN 1 AND 200),
    stream_id int NOT NULL,                    -- the stream that carries the run's tasks; ids are unique within it
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    status text NOT NULL DEFAULT 'running' CHECK (
        status IN ('running', 'completed', 'failed', 'cancelled', 'terminated', 'timed_out', 'continued_as_new')),
    started_at timestamptz NOT NULL,
    closed_at timestamptz,
    last_event int NOT NULL,                   -- the fence of advance: who does not know this number may not go on
    parent_run_id uuid,
    parent_seq int,                            -- which command of the parent started this run
    parent_close text NOT NULL DEFAULT 'terminate' CHECK (parent_close IN ('terminate', 'cancel', 'abandon')),
    memo json CHECK (octet_length(memo::text) <= 16777216),
    task_failure text                          -- why the last workflow task failed; the run stays open
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- At most one live run has a workflow id.  No step of a run changes a column of an index: steps are HOT updates.
CREATE UNIQUE INDEX run_live ON {schema}.run (workflow_id, stream_id) WHERE status = 'running';
CREATE INDEX run_by_workflow_id ON {schema}.run (workflow_id, started_at);
CREATE INDEX run_by_start ON {schema}.run (started_at);

-- The one total order of what happened to a run.  Rows are only ever added.
CREATE TABLE {schema}.event (
    run_id uuid NOT NULL,
    event_id int NOT NULL,
    type text NOT NULL,
    at timestamptz NOT NULL,                   -- history's clock, in whole milliseconds
    seq int,                                   -- the number of the command that it records or answers
    name text CHECK (length(name) <= 200),
    payload bytea CHECK (octet_length(payload) <= 16777216),
    -- json, not jsonb: texts of failures may have NULs
    attributes json CHECK (octet_length(attributes::text) <= 16777216),
    PRIMARY KEY (run_id, event_id)
);

-- What is on its way to a run: signals, cancels, outcomes of activities and children that ended elsewhere.
-- Plain inserts that wait for nobody; advance gives them their place in the history.
CREATE TABLE {schema}.inbox (
    run_id uuid NOT NULL,
    inbox_id bigint GENERATED ALWAYS AS IDENTITY,
    type text NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    seq int,
    name text CHECK (length(name) <= 200),
    payload bytea CHECK (octet_length(payload) <= 16777216),
    attributes json CHECK (octet_length(attributes::text) <= 16777216),
    PRIMARY KEY (run_id, inbox_id)
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- Ids of signals that were given one: the same id twice is one signal.
CREATE TABLE {schema}.signal_key (
    run_id uuid NOT NULL,
    key text NOT NULL CHECK (length(key) BETWEEN 1 AND 200),
    PRIMARY KEY (run_id, key)
);

-- Which client processes wait for the end of a run; closing it notifies them.
CREATE TABLE {schema}.waiter (
    run_id uuid NOT NULL,
    channel uuid NOT NULL,
    until timestamptz NOT NULL,
    PRIMARY KEY (run_id, channel)
);
