-- Escalations: the human steps of runs.  A row waits until somebody resolves it, it is cancelled, or its time is over.

CREATE TABLE {schema}.escalation (
    escalation_id uuid PRIMARY KEY,            -- derived from the run and the number of its command
    run_id uuid NOT NULL,
    seq int NOT NULL,
    stream_id int NOT NULL,                    -- the run's: who may see it
    role text NOT NULL CHECK (length(role) BETWEEN 1 AND 200),
    type text CHECK (length(type) BETWEEN 1 AND 200),
    subject text CHECK (length(subject) <= 1000),
    priority int NOT NULL,                     -- lower comes first
    payload bytea CHECK (octet_length(payload) <= 16777216),
    metadata jsonb CHECK (octet_length(metadata::text) <= 1048576),
    -- open: waiting or claimed, which is a matter of the time: a claim that ran out is none
    status text NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'resolved', 'cancelled', 'timed_out')),
    opened_at timestamptz NOT NULL,
    times_out_at timestamptz,                  -- as announced; its message on the run's stream decides
    claimed_by text CHECK (length(claimed_by) BETWEEN 1 AND 200),
    claimed_until timestamptz,
    closed_at timestamptz,
    resolved_by text CHECK (length(resolved_by) BETWEEN 1 AND 200),
    result bytea CHECK (octet_length(result) <= 16777216),
    -- Which call changed it last: one that is repeated because its answer was lost is answered as before.
    changed_by uuid
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX escalation_of_run ON {schema}.escalation (run_id);
CREATE INDEX escalation_by_role ON {schema}.escalation (role, status, priority, opened_at);
CREATE INDEX escalation_order ON {schema}.escalation (status, priority, opened_at);
CREATE INDEX escalation_by_subject ON {schema}.escalation (subject) WHERE subject IS NOT NULL;
CREATE INDEX escalation_by_metadata ON {schema}.escalation USING gin (metadata jsonb_path_ops) WHERE metadata IS NOT NULL;
