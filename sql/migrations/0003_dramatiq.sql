-- What Dramatiq's results, limiters, barriers and groups keep; unique keys, aborts, and messages that SQL wrote.

-- All of them NULL for most messages, where they cost nothing.  No claim changes one: it stays a HOT update.
ALTER TABLE {schema}.message
    ADD COLUMN group_id uuid,              -- the group whose completion this message counts for
    ADD COLUMN unique_key text CHECK (length(unique_key) BETWEEN 1 AND 200),
    ADD COLUMN abort_at timestamptz;       -- since when it is to be aborted; its worker finds out

-- At most one live message of a stream has a key.
CREATE UNIQUE INDEX message_unique ON {schema}.message (stream_id, unique_key) WHERE unique_key IS NOT NULL;

-- After a lost answer: which messages of its last call of enqueue_keyed were not stored.
ALTER TABLE {schema}.sender ADD COLUMN refused uuid[] NOT NULL DEFAULT '{}';

-- What a redrive needs to bring the message back as it was.
ALTER TABLE {schema}.dead_letter
    ADD COLUMN kind "char" NOT NULL DEFAULT 'm',
    ADD COLUMN group_id uuid,
    ADD COLUMN unique_key text;
CREATE INDEX dead_letter_by_message ON {schema}.dead_letter (message_id);

-- Results of actors, until they expire.  What a worker stores lies with the stream of the message that it has leased
-- (so that no worker can overwrite another stream's), what an administrator stores by hand with stream 0.
CREATE TABLE {schema}.result (
    key text NOT NULL CHECK (length(key) BETWEEN 1 AND 1000),
    stream_id int NOT NULL,
    expires_at timestamptz NOT NULL,
    value bytea NOT NULL CHECK (octet_length(value) <= 16777216),
    PRIMARY KEY (key, stream_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX result_expiry ON {schema}.result USING brin (expires_at) WITH (pages_per_range = 16, autosummarize = on);

-- Which processes wait for a result; storing it notifies them.
CREATE TABLE {schema}.result_waiter (
    key text NOT NULL,
    channel uuid NOT NULL,
    until timestamptz NOT NULL,
    PRIMARY KEY (key, channel)
) WITH (autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);

-- Counters of limiters and barriers.  Administrators share one space (0), any other principal has its own: what a scoped
-- worker counts reveals and blocks nothing foreign.
CREATE TABLE {schema}.limiter (
    key text NOT NULL CHECK (length(key) BETWEEN 1 AND 1000),
    space int NOT NULL,
    value bigint NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (key, space)
) WITH (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);

-- What tells this namespace from any other of the same name, in another database.
CREATE TABLE {schema}.identity (id uuid NOT NULL DEFAULT gen_random_uuid());
INSERT INTO {schema}.identity DEFAULT VALUES;

-- A little more than half of each page is kept free, so that the claim of every message on it finds room (HOT).
ALTER TABLE {schema}.message SET (fillfactor = 45);
