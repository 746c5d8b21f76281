-- Scopes: what a login that was provisioned may do, how much of it, and who has changed that when.

-- kind: what a principal is for.
--   application: an existing login, granted by hand: its grants say everything
--   worker: takes all that its streams have; activity: takes messages and activities, never a workflow's tasks;
--   workflow: takes workflows' tasks, never an activity; producer: takes nothing; monitor: reads counts, and no payload
ALTER TABLE {schema}.principal
    ADD COLUMN kind text NOT NULL DEFAULT 'application'
        CHECK (kind IN ('application', 'worker', 'activity', 'workflow', 'producer', 'monitor')),
    -- Limits; NULL: none.  What is over the two times is ended by the watchdog.
    ADD COLUMN max_live int CHECK (max_live > 0),
    ADD COLUMN max_statement interval CHECK (max_statement > interval '0'),
    ADD COLUMN max_transaction interval CHECK (max_transaction > interval '0');

-- Logins that we made are ours to end; those of others are not.
ALTER TABLE {schema}.login
    ADD COLUMN provisioned boolean NOT NULL DEFAULT false,
    ADD COLUMN created_at timestamptz NOT NULL DEFAULT now();

CREATE INDEX login_by_principal ON {schema}.login (principal_id);

-- What was done to whom by whom.  Never a secret, never a verifier.
CREATE TABLE {schema}.role_event (
    role_event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    by name NOT NULL DEFAULT session_user,
    action text NOT NULL,                      -- provisioned, login (one was made), granted, rotated, revoked, ended (a session, by the watchdog), expired
    principal text NOT NULL,
    login name,
    details json
);

-- Who has sent a message or started a run, where that is a principal with limits or with less than a stream's reading.
-- NULL: an administrator, or an application without limits.
ALTER TABLE {schema}.message ADD COLUMN principal_id int;
CREATE INDEX message_by_principal ON {schema}.message (principal_id) WHERE principal_id IS NOT NULL;
ALTER TABLE {schema}.run ADD COLUMN principal_id int;

-- The watchdog's last look; one row.
CREATE TABLE {schema}.watchdog (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    login name NOT NULL,
    host text NOT NULL,
    pid int NOT NULL,
    looked_at timestamptz NOT NULL
);
