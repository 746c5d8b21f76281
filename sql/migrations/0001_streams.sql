-- Streams: who may use them, the messages, the leases, the workers.
--
-- {schema} is the namespace, rendered when the migration runs.  Everything belongs to {owner}; nobody else has any
-- right on a table: all access is through the procedures in sql/procedures.

-- Who is who ---------------------------------------------------------------------------------------------------

-- A principal is a logical worker, application or operator.  Its logins come and go (a rotation makes a second one).
CREATE TABLE {schema}.principal (
    principal_id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 200),
    -- An administrator consumes and produces everywhere and may call the procedures of admin.sql.
    is_admin boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The database login is the identity: procedures compare it with session_user, which no SET can change.
CREATE TABLE {schema}.login (
    login name PRIMARY KEY,
    principal_id int NOT NULL,
    expires_at timestamptz
);

CREATE TABLE {schema}.stream (
    stream_id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 200),
    paused boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE {schema}.stream_grant (
    principal_id int NOT NULL,
    stream_id int NOT NULL,
    consume boolean NOT NULL DEFAULT false,
    produce boolean NOT NULL DEFAULT false,
    PRIMARY KEY (principal_id, stream_id)
);

-- Messages -----------------------------------------------------------------------------------------------------

-- One row a message; a claim sets the lease columns, an ack deletes the row.
--
-- No index has a column that a claim changes, so that a claim is a HOT update: half the page is left free for it.
CREATE TABLE {schema}.message (
    message_id uuid NOT NULL,
    stream_id int NOT NULL,
    priority int NOT NULL,                     -- lower comes first
    due_at timestamptz NOT NULL,               -- not handed out before this time
    enqueued_at timestamptz NOT NULL,
    -- The lease: who holds the message.  The token is the fencing value, new with every delivery.
    lease_token uuid,
    worker_id bigint,
    attempt int NOT NULL DEFAULT 1,            -- grows with every retry and every reclaim
    deaths smallint NOT NULL DEFAULT 0,        -- deliveries that were started and whose worker then died
    reclaimed boolean NOT NULL DEFAULT false,  -- was taken from a dead worker: the next start is recorded
    started boolean NOT NULL DEFAULT false,    -- the actor of this (reclaimed) delivery has begun
    -- m: a plain message; a: an activity of a run; s: a run's first task; t: a later task of a run; w: a timer of a run
    kind "char" NOT NULL DEFAULT 'm',
    run_id uuid,
    seq int,                                   -- which of the run's commands this message carries out
    actor text NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
    last_failure text,                         -- why the last attempt failed
    payload bytea NOT NULL CHECK (octet_length(payload) <= 16777216),
    UNIQUE (message_id, stream_id)
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_insert_scale_factor = 0.2, autovacuum_analyze_scale_factor = 0.1,
    autovacuum_vacuum_cost_delay = 0
);

-- The order in which a stream's messages are handed out.
CREATE INDEX message_order ON {schema}.message (stream_id, priority, due_at);

CREATE TABLE {schema}.dead_letter (
    dead_letter_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id uuid NOT NULL,
    stream_id int NOT NULL,
    priority int NOT NULL,
    enqueued_at timestamptz NOT NULL,
    died_at timestamptz NOT NULL DEFAULT now(),
    attempt int NOT NULL,
    deaths smallint NOT NULL,
    actor text NOT NULL,
    reason text NOT NULL,                      -- rejected: its retries ran out or it was refused; poison: it kept killing workers
    failure text,
    payload bytea NOT NULL
);
CREATE INDEX dead_letter_order ON {schema}.dead_letter (stream_id, died_at);

-- Workers ------------------------------------------------------------------------------------------------------

-- One row a worker process.  A worker that no longer beats is dead once its reclaim_delay is over.
CREATE TABLE {schema}.worker (
    worker_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    login name NOT NULL,
    principal_id int NOT NULL,
    host text NOT NULL,
    pid int NOT NULL,
    stream_ids int[] NOT NULL,
    threads int NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    reclaim_delay interval NOT NULL,
    reclaim_count int NOT NULL,
    beat bigint NOT NULL DEFAULT 0,
    beat_at timestamptz NOT NULL DEFAULT now(),
    -- Until when the worker wants to be woken; a sender looks here before it pays for a NOTIFY.
    waiting_until timestamptz,
    -- A superset of the messages that it has leased, so that a reclaim finds them without an index on the lease.
    held uuid[] NOT NULL DEFAULT '{}'
) WITH (fillfactor = 20, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0);

-- What a process has sent: the number of its last committed batch.  After a lost answer this row tells whether the
-- batch was committed, and a batch number that was given up can never be committed late.
CREATE TABLE {schema}.sender (
    sender uuid PRIMARY KEY,
    login name NOT NULL,
    batch bigint NOT NULL,
    given_up bigint NOT NULL DEFAULT 0,        -- the last batch that was asked about and had not been committed
    at timestamptz NOT NULL
) WITH (fillfactor = 20, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0);
