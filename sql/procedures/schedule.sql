-- Schedules: their definitions, their ticks, and what they fire.
--
-- A tick is claimed like any message.  Whoever holds its lease computes what is due, fires it and puts the tick back with
-- the next due time, in one transaction: a due time is dealt with once.  A change of the definition replaces the tick, so
-- that whoever is working on the old one finds its lease gone.
-- Locks are taken in the order schedule, message.

-- Internal: the caller's schedule of this name, locked.  Raises DD004 where there is none.
CREATE FUNCTION {schema}.own_schedule(p_name text)
RETURNS {schema}.schedule
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_caller record;
    v_schedule {schema}.schedule;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    SELECT s.* INTO v_schedule FROM {schema}.schedule s
    WHERE s.name = p_name AND s.space = CASE WHEN v_caller.is_admin THEN 0 ELSE v_caller.principal_id END
    FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no schedule %', quote_literal(left(p_name, 200)) USING ERRCODE = 'DD004';
    END IF;
    RETURN v_schedule;
END
$$;

-- Internal: give a schedule a new tick, due at once: who takes it finds out when the next due time is.
CREATE FUNCTION {schema}.set_tick(p_schedule {schema}.schedule)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    DELETE FROM {schema}.message m WHERE m.message_id = p_schedule.schedule_id AND m.kind = 'c';
    -- Before what it fires: a backlog delays the message, and not the decision whether there is to be one.
    INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, actor, payload)
    VALUES (p_schedule.schedule_id, p_schedule.stream_id, least(-1, p_schedule.priority), v_now, v_now, 'c',
            p_schedule.name, '');
    PERFORM {schema}.wake(ARRAY[p_schedule.stream_id]);
END
$$;

-- Internal: those of what a schedule has fired that have not ended.  A run's successors count as the run.
CREATE FUNCTION {schema}.still_live(p_schedule {schema}.schedule)
RETURNS uuid[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    IF p_schedule.kind = 'm' THEN
        RETURN ARRAY(
            SELECT f.id FROM unnest(p_schedule.live) WITH ORDINALITY f (id, n)
            WHERE EXISTS (SELECT 1 FROM {schema}.message m WHERE m.message_id = f.id AND m.stream_id = p_schedule.stream_id)
            ORDER BY f.n);
    END IF;
    RETURN ARRAY(
        SELECT f.id FROM unnest(p_schedule.live) WITH ORDINALITY f (id, n)
        WHERE EXISTS (
            SELECT 1 FROM {schema}.run r
            JOIN {schema}.run l ON l.workflow_id = r.workflow_id AND l.stream_id = r.stream_id AND l.status = 'running'
            WHERE r.run_id = f.id)
        ORDER BY f.n);
END
$$;

-- Internal: the workflow id of a due time's run.
CREATE FUNCTION {schema}.due_workflow_id(p_name text, p_due timestamptz)
RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN p_name || ':' || to_char(p_due AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
END
$$;

-- Internal: store the message, or start the run, of one due time.  Answers false where it is live already.
CREATE FUNCTION {schema}.fire_one(
    p_schedule {schema}.schedule, p_workflow_id text, p_id uuid, p_payload bytea, p_at timestamptz)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_status text;
    v_lot text;
BEGIN
    -- Ids of version 8 are the database's own.
    IF p_id IS NULL OR substr(p_id::text, 15, 1) = '8' OR (p_schedule.kind = 'm' AND p_payload IS NULL) THEN
        RETURN false;
    END IF;
    IF p_schedule.space <> 0 THEN
        -- Whoever fires it, it is its maker's: one who has all that he may have is given no more.
        SELECT l.login || '/' || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0') INTO v_lot
        FROM {schema}.login l
        WHERE l.principal_id = p_schedule.space AND starts_with(l.login, 'dd_') ORDER BY l.created_at DESC LIMIT 1;
        IF NOT {schema}.has_room(left(v_lot, -3), CASE p_schedule.kind WHEN 'm' THEN 'message' ELSE 'run' END, 1) THEN
            RETURN false;
        END IF;
    END IF;
    IF p_schedule.kind = 'm' THEN
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, lot)
        VALUES (p_id, p_schedule.stream_id, p_schedule.priority, p_at, p_at, p_schedule.actor, p_payload, v_lot)
        ON CONFLICT (message_id, stream_id) DO NOTHING;
        RETURN FOUND;
    END IF;
    SELECT c.status INTO v_status FROM {schema}.create_run(
        p_id, p_workflow_id, p_schedule.stream_id, p_schedule.actor, p_schedule.template, 'fail', 'allow', 0,
        p_schedule.facts, NULL, NULL, NULL, nullif(p_schedule.space, 0)) c;
    IF v_status = 'busy' AND NOT EXISTS (SELECT 1 FROM {schema}.run r WHERE r.run_id = p_id) THEN
        RAISE EXCEPTION 'the workflow id is being fought over' USING ERRCODE = '40001';
    END IF;
    IF v_lot IS NOT NULL AND v_status = 'started' THEN
        UPDATE {schema}.run r SET lot = v_lot WHERE r.run_id = p_id;
        UPDATE {schema}.message m SET lot = v_lot WHERE m.message_id = p_id AND m.stream_id = p_schedule.stream_id;
    END IF;
    RETURN v_status = 'started';
END
$$;

-- Make a schedule, or change the one of this name.  Answers created, updated, or kept (nothing is different, or
-- p_if_exists is 'keep').  Raises DD005 where there is one and p_if_exists is 'fail'.
-- Changing needs what making needs: to be allowed to send to the stream.  An update leaves a schedule paused that was
-- paused; with another expression or time zone, its due times count from now on.
CREATE FUNCTION {schema}.save_schedule(
    p_sender uuid, p_batch bigint, p_name text, p_if_exists text, p_paused boolean, p_stream int, p_kind text,
    p_actor text, p_priority int, p_template bytea, p_facts text, p_cron text, p_timezone text, p_catch_up bigint,
    p_overlap text)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_caller record;
    v_space int;
    v_old {schema}.schedule;
    v_new {schema}.schedule;
    v_moved boolean;
    v_other_times boolean;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    v_space := CASE WHEN v_caller.is_admin THEN 0 ELSE v_caller.principal_id END;
    IF cardinality({schema}.permitted(v_caller.principal_id, v_caller.is_admin, ARRAY[p_stream], 'p')) = 0 THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
    PERFORM {schema}.begin_batch(p_sender, p_batch, 1);
    IF starts_with(session_user, 'dd_') THEN
        IF NOT EXISTS (SELECT 1 FROM {schema}.schedule s WHERE s.name = p_name AND s.space = v_space) THEN
            PERFORM {schema}.check_room('schedule', 1);
        END IF;
        PERFORM {schema}.check_room('message', 1);
    END IF;
    INSERT INTO {schema}.schedule AS s (
        space, name, stream_id, kind, actor, priority, template, facts, cron, timezone, catch_up, overlap, paused)
    VALUES (v_space, p_name, p_stream, p_kind::"char", p_actor, p_priority, p_template, p_facts::json, p_cron, p_timezone,
            p_catch_up, p_overlap, p_paused)
    ON CONFLICT (name, space) DO NOTHING
    RETURNING s.* INTO v_new;
    IF FOUND THEN
        IF NOT p_paused THEN
            PERFORM {schema}.set_tick(v_new);
        END IF;
        RETURN 'created';
    ELSIF p_if_exists = 'keep' THEN
        RETURN 'kept';
    ELSIF p_if_exists IS DISTINCT FROM 'update' THEN
        RAISE EXCEPTION 'there is a schedule % already', quote_literal(p_name) USING ERRCODE = 'DD005';
    END IF;
    SELECT s.* INTO v_old FROM {schema}.schedule s WHERE s.name = p_name AND s.space = v_space FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the schedule was deleted in this moment' USING ERRCODE = '40001';
    END IF;
    v_moved := (v_old.stream_id, v_old.kind::text) IS DISTINCT FROM (p_stream, p_kind);
    v_other_times := (v_old.cron, v_old.timezone) IS DISTINCT FROM (p_cron, p_timezone);
    IF NOT v_moved AND NOT v_other_times
       AND (v_old.actor, v_old.priority, v_old.template, v_old.facts::text, v_old.catch_up, v_old.overlap)
           IS NOT DISTINCT FROM (p_actor, p_priority, p_template, p_facts, p_catch_up, p_overlap) THEN
        RETURN 'kept';
    END IF;
    UPDATE {schema}.schedule s
    SET revision = s.revision + 1, stream_id = p_stream, kind = p_kind::"char", actor = p_actor, priority = p_priority,
        template = p_template, facts = p_facts::json, cron = p_cron, timezone = p_timezone, catch_up = p_catch_up,
        overlap = p_overlap,
        seen_to = CASE WHEN v_other_times THEN clock_timestamp() ELSE s.seen_to END,
        live = CASE WHEN v_moved THEN '{}' ELSE s.live END,
        waiting = CASE WHEN p_overlap = 'buffer_one' THEN s.waiting END,
        skipped = s.skipped + (s.waiting IS NOT NULL AND p_overlap <> 'buffer_one')::int
    WHERE s.schedule_id = v_old.schedule_id
    RETURNING s.* INTO v_new;
    IF NOT v_new.paused THEN
        PERFORM {schema}.set_tick(v_new);
    END IF;
    RETURN 'updated';
END
$$;

-- Pause, resume or delete the caller's schedule of this name (p_verb).  Each may be repeated, but for a delete.
-- What was due while it was paused is not caught up; what waited for something to end when it was paused is skipped.
CREATE FUNCTION {schema}.control_schedule(p_sender uuid, p_batch bigint, p_name text, p_verb text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_schedule {schema}.schedule;
BEGIN
    PERFORM {schema}.begin_batch(p_sender, p_batch, 1);
    v_schedule := {schema}.own_schedule(p_name);
    IF p_verb = 'resume' THEN
        -- A tick that a foreign hand has removed comes back too.
        IF v_schedule.paused OR NOT EXISTS (
            SELECT 1 FROM {schema}.message m WHERE m.message_id = v_schedule.schedule_id AND m.stream_id = v_schedule.stream_id) THEN
            UPDATE {schema}.schedule s SET paused = false, failure = NULL, seen_to = clock_timestamp()
            WHERE s.schedule_id = v_schedule.schedule_id;
            PERFORM {schema}.set_tick(v_schedule);
        END IF;
        RETURN;
    ELSIF p_verb = 'pause' THEN
        UPDATE {schema}.schedule s
        SET paused = true, waiting = NULL, skipped = s.skipped + (s.waiting IS NOT NULL)::int
        WHERE s.schedule_id = v_schedule.schedule_id AND NOT s.paused;
    ELSIF p_verb = 'delete' THEN
        DELETE FROM {schema}.schedule s WHERE s.schedule_id = v_schedule.schedule_id;
    ELSE
        RAISE EXCEPTION 'a schedule can be paused, resumed and deleted' USING ERRCODE = '22023';
    END IF;
    DELETE FROM {schema}.message m WHERE m.message_id = v_schedule.schedule_id AND m.kind = 'c';
END
$$;

-- Fire the caller's schedule by hand: now (p_due is NULL: the run's workflow id has its run id), or for due times of the
-- past.  Answers per position whether it was fired; what is live already is not fired again.
-- What it fires now counts for the overlap policy, what it fires for the past does not.
CREATE FUNCTION {schema}.fire_by_hand(
    p_sender uuid, p_batch bigint, p_name text, p_revision int, p_due bigint[], p_ids uuid[], p_payloads bytea[])
RETURNS boolean[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_caller record;
    v_schedule {schema}.schedule;
    v_now timestamptz := clock_timestamp();
    v_answer boolean[] := '{}';
    v_new boolean;
    v_live uuid[];
    i int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_ids));
    v_schedule := {schema}.own_schedule(p_name);
    IF cardinality({schema}.permitted(v_caller.principal_id, v_caller.is_admin, ARRAY[v_schedule.stream_id], 'p')) = 0 THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
    IF v_schedule.revision IS DISTINCT FROM p_revision THEN
        -- The messages were made of what it was before.
        RAISE EXCEPTION 'the schedule % was changed in this moment', quote_literal(p_name) USING ERRCODE = 'DD006';
    END IF;
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('message', cardinality(p_ids));
    END IF;
    v_live := v_schedule.live;
    FOR i IN 1 .. coalesce(cardinality(p_ids), 0) LOOP
        v_new := {schema}.fire_one(
            v_schedule,
            CASE WHEN p_due[i] IS NULL THEN v_schedule.name || ':' || p_ids[i]
                 ELSE {schema}.due_workflow_id(v_schedule.name, to_timestamp(least(p_due[i], 253402300799000) / 1000.0)) END,
            p_ids[i], p_payloads[i], v_now + i * interval '1 microsecond');
        v_answer := v_answer || v_new;
        IF v_new AND p_due[i] IS NULL THEN
            v_live := v_live || p_ids[i];
        END IF;
    END LOOP;
    v_schedule.live := v_live;
    UPDATE {schema}.schedule s
    SET fired = s.fired + cardinality(array_remove(v_answer, false)), live = {schema}.still_live(v_schedule)
    WHERE s.schedule_id = v_schedule.schedule_id;
    PERFORM {schema}.wake(ARRAY[v_schedule.stream_id]);
    RETURN v_answer;
END
$$;

-- The caller's schedules, by name; one of them with its template.  Its times are in no zone of their own.
CREATE FUNCTION {schema}.list_schedules(p_name text)
RETURNS TABLE (
    schedule_id uuid, name text, revision int, kind text, actor text, queue_name text, template bytea, cron text,
    timezone text, catch_up bigint, overlap text, paused boolean, failure text, created_at timestamptz, seen_to timestamptz,
    waiting timestamptz, live uuid[], fired bigint, skipped bigint, missed bigint, last_due timestamptz, last_id uuid,
    now timestamptz, workers bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_caller record;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    RETURN QUERY
        SELECT s.schedule_id, s.name, s.revision, s.kind::text, s.actor, q.name, CASE WHEN p_name IS NOT NULL THEN s.template END,
               s.cron, s.timezone, s.catch_up, s.overlap, s.paused, coalesce(s.failure, m.last_failure), s.created_at,
               s.seen_to, s.waiting, {schema}.still_live(s), s.fired, s.skipped, s.missed, s.last_due, s.last_id,
               clock_timestamp(), {schema}.live_workers(s.stream_id)
        FROM {schema}.schedule s
        JOIN {schema}.stream q ON q.stream_id = s.stream_id
        LEFT JOIN {schema}.message m ON m.message_id = s.schedule_id AND m.stream_id = s.stream_id
        WHERE s.space = CASE WHEN v_caller.is_admin THEN 0 ELSE v_caller.principal_id END
          AND (p_name IS NULL OR s.name = p_name)
        ORDER BY s.name;
END
$$;

-- What a worker needs to know to fire the schedules whose ticks it has leased (n: position).  Times are milliseconds
-- since the epoch, rounded down: a due time is a whole second.  The input of runs stays here.
CREATE FUNCTION {schema}.schedules_of_leases(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS TABLE (
    n int, schedule_id uuid, name text, kind text, template bytea, cron text, timezone text, catch_up bigint,
    seen_to bigint, waiting bigint, now bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    RETURN QUERY
        SELECT t.n::int, s.schedule_id, s.name, s.kind::text, CASE s.kind WHEN 'm' THEN s.template ELSE '' END,
               s.cron, s.timezone, s.catch_up, floor(extract(epoch FROM s.seen_to) * 1000)::bigint, floor(extract(epoch FROM s.waiting) * 1000)::bigint,
               floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                               AND m.worker_id = v_worker.worker_id AND m.kind = 'c'
        JOIN {schema}.schedule s ON s.schedule_id = m.message_id AND s.stream_id = m.stream_id;
END
$$;

-- Fire what is due of the schedules whose ticks are leased to this worker, and put the ticks back.
--
-- For tick i: up to p_seen[i] all due times have been dealt with, p_missed[i] of them were too old, p_next[i] is the next
-- one (milliseconds since the epoch).  Its due times that are to be fired are the next p_counts[i] of p_due, in order,
-- each with an id and (but for runs) a payload; the one that waits, if one does, stands first.
-- Answers the positions whose lease is no longer the live one: nothing of them happened; and how many messages (no runs)
-- were fired for each tick.
CREATE FUNCTION {schema}.fire_schedules(
    p_worker uuid, p_messages uuid[], p_leases uuid[], p_seen bigint[], p_missed bigint[], p_next bigint[], p_counts int[],
    p_due bigint[], p_ids uuid[], p_payloads bytea[], OUT refused int[], OUT fired int[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_now timestamptz := clock_timestamp();
    v_schedule {schema}.schedule;
    v_due timestamptz;
    v_waited boolean;
    v_fired boolean;
    v_next timestamptz;
    v_streams int[] := '{}';
    v_last int := 0;
    i int;
    j int;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    refused := '{}';
    fired := array_fill(0, ARRAY[cardinality(p_messages)]);
    FOR i IN 1 .. cardinality(p_messages) LOOP
        j := v_last;
        v_last := v_last + greatest(coalesce(p_counts[i], 0), 0);
        SELECT s.* INTO v_schedule
        FROM {schema}.message m JOIN {schema}.schedule s ON s.schedule_id = m.message_id AND s.stream_id = m.stream_id
        WHERE m.message_id = p_messages[i] AND m.lease_token = p_leases[i] AND m.worker_id = v_worker.worker_id
          AND m.kind = 'c'
        FOR NO KEY UPDATE OF s SKIP LOCKED;
        IF NOT FOUND THEN
            -- Somebody is at the schedule in this moment, and is not waited for; or the lease is gone.
            UPDATE {schema}.message m
            SET lease_token = NULL, worker_id = NULL, due_at = v_now + interval '1 second'
            FROM (SELECT q.message_id, q.stream_id FROM {schema}.message q
                  WHERE q.message_id = p_messages[i] AND q.lease_token = p_leases[i] AND q.worker_id = v_worker.worker_id
                    AND q.kind = 'c'
                  FOR UPDATE SKIP LOCKED) t
            WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
            IF NOT FOUND THEN
                refused := refused || i;
            END IF;
            CONTINUE;
        END IF;
        -- Whoever made it and was deprived of the stream since then does not send to it any more.
        IF v_schedule.space <> 0 AND cardinality({schema}.permitted(
            v_schedule.space, coalesce((SELECT p.is_admin FROM {schema}.principal p WHERE p.principal_id = v_schedule.space), false),
            ARRAY[v_schedule.stream_id], 'p')) = 0 THEN
            UPDATE {schema}.schedule s
            SET paused = true, waiting = NULL, failure = 'whoever made it may no longer send to the stream'
            WHERE s.schedule_id = v_schedule.schedule_id;
            DELETE FROM {schema}.message m WHERE m.message_id = v_schedule.schedule_id AND m.lease_token = p_leases[i];
            CONTINUE;
        END IF;

        WHILE j < v_last LOOP
            j := j + 1;
            v_due := to_timestamp(least(p_due[j], 253402300799000) / 1000.0);
            v_waited := v_due = v_schedule.waiting;
            IF v_waited IS NOT TRUE THEN
                -- Each once, in order, not before its time, and none but whole seconds.
                CONTINUE WHEN (v_due > v_schedule.seen_to AND v_due <= v_now AND p_due[j] % 1000 = 0) IS NOT TRUE;
                v_schedule.seen_to := v_due;
                IF v_schedule.waiting IS NOT NULL THEN
                    v_schedule.skipped := v_schedule.skipped + 1;
                    CONTINUE;
                END IF;
            END IF;
            IF v_schedule.overlap <> 'allow' THEN
                v_schedule.live := {schema}.still_live(v_schedule);
                IF cardinality(v_schedule.live) > 0 THEN
                    IF v_schedule.overlap = 'buffer_one' THEN
                        v_schedule.waiting := v_due;
                    ELSE
                        v_schedule.skipped := v_schedule.skipped + 1;
                    END IF;
                    CONTINUE;
                END IF;
            END IF;
            v_schedule.waiting := NULL;
            -- Whoever made the schedule may have said what no run can be started with: that is no error of whoever fires it,
            -- nor of the other schedules.
            BEGIN
                v_fired := {schema}.fire_one(
                    v_schedule, {schema}.due_workflow_id(v_schedule.name, v_due), p_ids[j], p_payloads[j],
                    v_now + j * interval '1 microsecond');
            EXCEPTION WHEN data_exception OR check_violation OR program_limit_exceeded THEN
                v_fired := false;
            END;
            IF v_fired THEN
                v_schedule.fired := v_schedule.fired + 1;
                fired[i] := fired[i] + (v_schedule.kind = 'm')::int;
                v_schedule.live := ARRAY[p_ids[j]];
                v_schedule.last_due := v_due;
                v_schedule.last_id := p_ids[j];
            ELSE
                v_schedule.skipped := v_schedule.skipped + 1;
            END IF;
        END LOOP;

        v_next := to_timestamp(least(greatest(coalesce(p_next[i], 0), 0), 253402300799000) / 1000.0);
        IF v_schedule.waiting IS NOT NULL THEN
            -- Nobody tells a schedule that what it waits for has ended.
            v_next := least(v_next, v_now + interval '1 second');
        END IF;
        UPDATE {schema}.message m
        SET lease_token = NULL, worker_id = NULL, started = false, reclaimed = false, attempt = 1, last_failure = NULL,
            due_at = v_next
        WHERE m.message_id = v_schedule.schedule_id AND m.lease_token = p_leases[i] AND m.worker_id = v_worker.worker_id;
        IF NOT FOUND THEN
            -- The worker was declared dead between the look above and here: nothing is recorded, the caller finds out.
            RAISE EXCEPTION 'a lease was lost in this very moment' USING ERRCODE = '40001';
        END IF;
        UPDATE {schema}.schedule s
        SET seen_to = greatest(v_schedule.seen_to, least(to_timestamp(p_seen[i] / 1000.0), v_now)),
            waiting = v_schedule.waiting, live = v_schedule.live, fired = v_schedule.fired, skipped = v_schedule.skipped,
            missed = v_schedule.missed + least(greatest(coalesce(p_missed[i], 0), 0), 1000000),
            last_due = v_schedule.last_due, last_id = v_schedule.last_id
        WHERE s.schedule_id = v_schedule.schedule_id;
        v_streams := v_streams || v_schedule.stream_id;
    END LOOP;
    -- Also where nothing was fired: they learn when the tick is due.
    PERFORM {schema}.wake(v_streams);
END
$$;
