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

-- Who has started a run, where that is a principal with less than a stream's reading.
-- NULL: an administrator, or an application.
ALTER TABLE {schema}.run ADD COLUMN principal_id int;

-- What a provisioned login (dd_...) has stored is counted by this: the login, and one of 64 lots that chance draws, so
-- that a look at one of them tells how many there are of all.  NULL, in no index, for everybody else.
-- A default: whatever procedure stores a row, and for whatever reason, its caller is charged with it.
ALTER TABLE {schema}.message ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.inbox ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.run ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.run_query ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.topic_event ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.dead_letter ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.result ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.limiter ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.sender ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.waiter ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.update_waiter ADD COLUMN lot text COLLATE "C";
ALTER TABLE {schema}.result_waiter ADD COLUMN lot text COLLATE "C";

-- Not random(): what that answers, its caller's setseed() decides.
ALTER TABLE {schema}.message ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.inbox ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.run ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.run_query ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.topic_event ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.dead_letter ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.result ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.limiter ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.sender ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.waiter ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.update_waiter ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;
ALTER TABLE {schema}.result_waiter ALTER COLUMN lot SET DEFAULT CASE WHEN starts_with(session_user, 'dd_') THEN
    session_user || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') END;

CREATE INDEX message_lot ON {schema}.message (lot) WHERE lot IS NOT NULL;
CREATE INDEX inbox_lot ON {schema}.inbox (lot) WHERE lot IS NOT NULL;
CREATE INDEX run_lot ON {schema}.run (lot) WHERE lot IS NOT NULL AND status = 'running';
CREATE INDEX run_query_lot ON {schema}.run_query (lot) WHERE lot IS NOT NULL;
CREATE INDEX topic_event_lot ON {schema}.topic_event (lot) WHERE lot IS NOT NULL;
CREATE INDEX dead_letter_lot ON {schema}.dead_letter (lot) WHERE lot IS NOT NULL;
CREATE INDEX result_lot ON {schema}.result (lot) WHERE lot IS NOT NULL;
CREATE INDEX limiter_lot ON {schema}.limiter (lot) WHERE lot IS NOT NULL;
CREATE INDEX sender_lot ON {schema}.sender (lot) WHERE lot IS NOT NULL;
CREATE INDEX waiter_lot ON {schema}.waiter (lot) WHERE lot IS NOT NULL;
CREATE INDEX update_waiter_lot ON {schema}.update_waiter (lot) WHERE lot IS NOT NULL;
CREATE INDEX result_waiter_lot ON {schema}.result_waiter (lot) WHERE lot IS NOT NULL;

-- The watchdog's last look; one row.
CREATE TABLE {schema}.watchdog (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    login name NOT NULL,
    host text NOT NULL,
    pid int NOT NULL,
    looked_at timestamptz NOT NULL
);
