-- What is said to runs and answered by their code: updates and queries.

-- Updates that were asked for, by the id that the asker gave.  They stay as long as their run: whoever asks again with
-- the same id gets the same outcome.
CREATE TABLE {schema}.run_update (
    chain_id uuid NOT NULL,                    -- the first of the runs that follow each other: an id is one update for all
    run_id uuid NOT NULL,                      -- the one of them that has it
    update_id text NOT NULL CHECK (length(update_id) BETWEEN 1 AND 200),
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    -- rejected leaves no event; the outcome of the others is in the history
    status text NOT NULL DEFAULT 'requested' CHECK (status IN ('requested', 'accepted', 'completed', 'rejected')),
    event_id int,                              -- the UpdateCompleted event
    failure json CHECK (octet_length(failure::text) <= 16777216),
    PRIMARY KEY (chain_id, update_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX run_update_by_run ON {schema}.run_update (run_id);

-- Which client processes wait for an update.
CREATE TABLE {schema}.update_waiter (
    chain_id uuid NOT NULL,
    update_id text NOT NULL,
    channel uuid NOT NULL,
    until timestamptz NOT NULL,
    PRIMARY KEY (chain_id, update_id, channel)
) WITH (autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);

-- Queries under way.  The message of kind 'q' that brings one to a worker has the same id; who asked is told on the channel.
CREATE TABLE {schema}.run_query (
    query_id uuid PRIMARY KEY,
    run_id uuid NOT NULL,
    stream_id int NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    input bytea NOT NULL CHECK (octet_length(input) <= 16777216),
    channel uuid NOT NULL,
    until timestamptz NOT NULL,
    answered boolean NOT NULL DEFAULT false,
    answer bytea CHECK (octet_length(answer) <= 16777216),
    failure json CHECK (octet_length(failure::text) <= 16777216)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX run_query_expiry ON {schema}.run_query (until);
