-- What one can ask of runs: their search attributes and entities, their output, the topics that they emit to.

-- A row only where a run has any of it: no step of another run pays for it.
CREATE TABLE {schema}.run_state (
    run_id uuid PRIMARY KEY,
    search jsonb NOT NULL DEFAULT '{}' CONSTRAINT search_payload CHECK (
        jsonb_typeof(search) = 'object' AND octet_length(search::text) <= 1048576),
    entity jsonb NOT NULL DEFAULT '{}' CONSTRAINT entity_payload CHECK (
        jsonb_typeof(entity) = 'object' AND octet_length(entity::text) <= 16777216)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX run_state_search ON {schema}.run_state USING gin (search jsonb_path_ops);
CREATE INDEX run_state_entity ON {schema}.run_state USING gin (entity jsonb_path_ops);

-- Runs by what they are listed by.  The index of workflow ids finds those that begin with something, too.
DROP INDEX {schema}.run_by_workflow_id;
CREATE INDEX run_by_workflow_id ON {schema}.run (workflow_id text_pattern_ops, started_at);
CREATE INDEX run_by_status ON {schema}.run (status, started_at);
CREATE INDEX run_by_name ON {schema}.run (name, started_at);

-- What a run has put out, by its place in the output.
CREATE INDEX event_output ON {schema}.event (run_id, ((attributes ->> 'offset')::int)) WHERE type = 'OutputWritten';

-- Until when whoever waits wants to hear of output, too, and not only of the end.
ALTER TABLE {schema}.waiter ADD COLUMN output_until timestamptz;

-- Topics --------------------------------------------------------------------------------------------------------------

-- Which actors are given the events of a topic.
CREATE TABLE {schema}.subscription (
    subscription_id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL CHECK (length(topic) BETWEEN 1 AND 200),
    stream_id int NOT NULL,
    actor text NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
    priority int NOT NULL,
    -- As with limiters: an administrator's (0) is given the events of every stream, any other principal's those of the
    -- streams that it has a grant for.
    space int NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (stream_id, actor, topic)
);
CREATE INDEX subscription_by_topic ON {schema}.subscription (topic);

-- Whoever sends a subscriber the next event of a run holds the run's lane; nobody ever waits for one.
CREATE TABLE {schema}.topic_lane (
    subscription_id int NOT NULL,
    lane int NOT NULL,
    PRIMARY KEY (subscription_id, lane)
);

-- What a subscriber has not dealt with yet: of each run one event is on its way to it (sent), the others wait behind it.
CREATE TABLE {schema}.topic_event (
    subscription_id int NOT NULL,
    run_id uuid NOT NULL,
    event_id int NOT NULL,
    sent boolean NOT NULL DEFAULT false,
    PRIMARY KEY (subscription_id, run_id, event_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- Whether few or many runs have ids with a prefix decides by which index a list is made.
ALTER TABLE {schema}.run ALTER COLUMN workflow_id SET STATISTICS 1000;
