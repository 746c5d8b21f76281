-- Activities: their limits, heartbeats and cancels.
--
-- An activity's message is found by its id, which is derived from the run and the number of the command.  Its message is
-- locked first and its row in activity second; whoever must not wait (advance, an alarm) skips a locked message.

-- Internal: the id of an activity's message, and of the alarm that keeps its limits.
CREATE FUNCTION {schema}.activity_ids(p_run uuid, p_seq int, OUT message_id uuid, OUT alarm_id uuid)
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    message_id := overlay(md5(p_run::text || ':' || p_seq) PLACING '8' FROM 13)::uuid;
    alarm_id := overlay(md5(p_run::text || ':' || p_seq || ':alarm') PLACING '8' FROM 13)::uuid;
END
$$;

-- Internal: have an activity's limits looked at by this time.  An alarm that somebody has in this moment looks by itself.
-- Answers the run's stream.
CREATE FUNCTION {schema}.set_alarm(p_run uuid, p_seq int, p_at timestamptz)
RETURNS int
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_id uuid := (SELECT i.alarm_id FROM {schema}.activity_ids(p_run, p_seq) i);
    v_run record;
BEGIN
    SELECT r.stream_id, r.name INTO v_run FROM {schema}.run r WHERE r.run_id = p_run;
    IF p_at IS NULL OR v_run.stream_id IS NULL THEN
        RETURN v_run.stream_id;
    END IF;
    UPDATE {schema}.message m SET due_at = least(m.due_at, p_at)
    FROM (SELECT q.message_id, q.stream_id FROM {schema}.message q
          WHERE q.message_id = v_id AND q.lease_token IS NULL FOR UPDATE SKIP LOCKED) t
    WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
    IF NOT FOUND THEN
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, seq, actor, payload)
        VALUES (v_id, v_run.stream_id, -1, p_at, clock_timestamp(), 'd', p_run, p_seq, v_run.name, '')
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN v_run.stream_id;
END
$$;

-- Internal: an activity with limits was just stored: keep them, as its event records them.  Answers the run's stream.
CREATE FUNCTION {schema}.watch_activity(p_run uuid, p_seq int)
RETURNS int
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_limits record;
    v_retry record;
    v_due timestamptz;
    v_last int;
    v_first bigint;
    v_most constant bigint := 315360000000;
BEGIN
    SELECT m.due_at INTO v_due FROM {schema}.message m
    WHERE m.message_id = (SELECT i.message_id FROM {schema}.activity_ids(p_run, p_seq) i) AND m.run_id = p_run;
    -- It was recorded by this very step: backwards from the run's end.
    SELECT r.last_event INTO v_last FROM {schema}.run r WHERE r.run_id = p_run;
    SELECT x.* INTO v_limits
    FROM (SELECT e.attributes FROM {schema}.event e
          WHERE e.run_id = p_run AND e.event_id <= v_last AND e.type = 'ActivityScheduled' AND e.seq = p_seq
          ORDER BY e.event_id DESC LIMIT 1) a,
         json_to_record(a.attributes -> 'options' -> 'durable_limits') x (
             start_to_close bigint, schedule_to_start bigint, schedule_to_close bigint, heartbeat bigint, retry json);
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT * INTO v_retry FROM json_to_record(v_limits.retry) x (initial bigint, coefficient float8, maximum bigint, attempts int);
    INSERT INTO {schema}.activity (
        run_id, seq, scheduled_at, start_to_close, schedule_to_start, schedule_to_close, heartbeat,
        retry_initial, retry_coefficient, retry_maximum, retry_attempts)
    VALUES (
        p_run, p_seq, v_due,
        CASE WHEN v_limits.start_to_close BETWEEN 1 AND v_most THEN v_limits.start_to_close END,
        CASE WHEN v_limits.schedule_to_start BETWEEN 1 AND v_most THEN v_limits.schedule_to_start END,
        CASE WHEN v_limits.schedule_to_close BETWEEN 1 AND v_most THEN v_limits.schedule_to_close END,
        CASE WHEN v_limits.heartbeat BETWEEN 1 AND v_most THEN v_limits.heartbeat END,
        CASE WHEN v_retry.initial BETWEEN 0 AND v_most THEN v_retry.initial ELSE 1000 END,
        CASE WHEN v_retry.coefficient BETWEEN 1 AND 1000 THEN v_retry.coefficient ELSE 2 END,
        CASE WHEN v_retry.maximum BETWEEN 0 AND v_most THEN v_retry.maximum END,
        CASE WHEN v_retry.attempts >= 1 THEN v_retry.attempts END)
    ON CONFLICT DO NOTHING
    RETURNING least(schedule_to_start, schedule_to_close) INTO v_first;
    -- Where neither is given there is nothing to wait for before it begins.
    RETURN {schema}.set_alarm(p_run, p_seq, v_due + v_first * interval '1 millisecond');
END
$$;

-- Internal: an activity has ended.  Its message is gone, or locked by the caller.
CREATE FUNCTION {schema}.forget_activity(p_run uuid, p_seq int)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    DELETE FROM {schema}.activity a WHERE a.run_id = p_run AND a.seq = p_seq;
    DELETE FROM {schema}.activity_cancel c WHERE c.run_id = p_run AND c.seq = p_seq;
    -- An alarm that somebody has in this moment finds nothing to watch.
    DELETE FROM {schema}.message m
    USING (SELECT q.message_id, q.stream_id FROM {schema}.message q
           WHERE q.message_id = (SELECT i.alarm_id FROM {schema}.activity_ids(p_run, p_seq) i) AND q.lease_token IS NULL
           FOR UPDATE SKIP LOCKED) t
    WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
END
$$;

-- Internal: a run has closed, and nobody wants to know of its activities.  What a worker is at in this moment is left: it
-- goes with the activity's end.
CREATE FUNCTION {schema}.forget_activities(p_run uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_seqs int[];
BEGIN
    WITH gone AS (
        DELETE FROM {schema}.activity a
        USING (SELECT q.run_id, q.seq FROM {schema}.activity q WHERE q.run_id = p_run FOR UPDATE SKIP LOCKED) t
        WHERE a.run_id = t.run_id AND a.seq = t.seq RETURNING a.seq)
    SELECT array_agg(g.seq) INTO v_seqs FROM gone g;
    DELETE FROM {schema}.activity_cancel c WHERE c.run_id = p_run;
    IF v_seqs IS NOT NULL THEN
        DELETE FROM {schema}.message m
        USING (SELECT q.message_id, q.stream_id
               FROM unnest(v_seqs) s (seq)
               JOIN {schema}.message q ON q.message_id = (SELECT i.alarm_id FROM {schema}.activity_ids(p_run, s.seq) i)
               WHERE q.lease_token IS NULL FOR UPDATE OF q SKIP LOCKED) t
        WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
    END IF;
END
$$;

-- Internal: workers that have something to look after.
CREATE FUNCTION {schema}.tell_workers(p_workers bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_worker bigint;
BEGIN
    FOREACH v_worker IN ARRAY coalesce(p_workers, '{}') LOOP
        -- As everywhere: a full notification queue fails nothing; workers look from time to time.
        IF v_worker IS NOT NULL AND pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('{namespace}:w' || v_worker, '');
        END IF;
    END LOOP;
END
$$;

-- Internal: a run's code cancels one of its activities.  One that no worker has is withdrawn; where the run waits for its
-- outcome (p_wait), that is the outcome.  A worker that has it is told, and goes on being told until it has ended.
CREATE FUNCTION {schema}.cancel_activity(p_run uuid, p_seq int, p_name text, p_wait boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_message {schema}.message;
    v_parked boolean;
BEGIN
    SELECT q.* INTO v_message FROM {schema}.message q
    WHERE q.message_id = (SELECT i.message_id FROM {schema}.activity_ids(p_run, p_seq) i) AND q.run_id = p_run
    FOR UPDATE SKIP LOCKED;
    IF FOUND AND v_message.lease_token IS NULL THEN
        v_parked := v_message.watched IS TRUE AND EXISTS (
            SELECT 1 FROM {schema}.activity a
            WHERE a.run_id = p_run AND a.seq = p_seq AND a.token IS NOT NULL AND a.token_attempt = v_message.attempt);
        IF NOT v_parked OR NOT p_wait THEN
            DELETE FROM {schema}.message m WHERE m.message_id = v_message.message_id AND m.stream_id = v_message.stream_id;
            IF v_parked THEN
                -- Whoever has the token is told so, until the run closes.
                INSERT INTO {schema}.activity_cancel (run_id, seq) VALUES (p_run, p_seq) ON CONFLICT DO NOTHING;
            ELSIF v_message.watched THEN
                PERFORM {schema}.forget_activity(p_run, p_seq);
            END IF;
            IF p_wait THEN
                INSERT INTO {schema}.inbox (run_id, type, seq, name, attributes)
                VALUES (p_run, 'ActivityFailed', p_seq, p_name, json_build_object('failure', json_build_object(
                    'type', 'ActivityCancelled', 'message', 'it was cancelled before a worker had it', 'retryable', false,
                    'attempt', v_message.attempt)));
                PERFORM {schema}.add_tasks(ARRAY[p_run]);
            END IF;
            RETURN;
        END IF;
    END IF;
    -- Also where its message is locked in this moment: whoever takes or has it finds this.
    INSERT INTO {schema}.activity_cancel (run_id, seq) VALUES (p_run, p_seq) ON CONFLICT DO NOTHING;
    IF v_message.worker_id IS NOT NULL THEN
        UPDATE {schema}.message m SET watched = true
        WHERE m.message_id = v_message.message_id AND m.stream_id = v_message.stream_id AND m.watched IS NOT TRUE;
        PERFORM {schema}.tell_workers(ARRAY[v_message.worker_id]);
    END IF;
END
$$;

-- The actors of these activities, which have limits, are about to begin.
-- Answers the positions whose lease is no longer the live one: their actors must not begin.
CREATE FUNCTION {schema}.start_activities(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_row record;
    v_now timestamptz := clock_timestamp();
    v_done bigint[] := '{}';
    v_soon bigint;
    v_streams int[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    FOR v_row IN
        SELECT t.n, m.run_id, m.seq, m.lease_token
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                               AND m.worker_id = v_worker.worker_id AND m.kind = 'a'
        ORDER BY m.message_id
        FOR NO KEY UPDATE OF m
    LOOP
        v_done := v_done || v_row.n;
        UPDATE {schema}.activity a SET lease = v_row.lease_token, started_at = v_now, beat_at = NULL
        WHERE a.run_id = v_row.run_id AND a.seq = v_row.seq
        RETURNING least(a.start_to_close, a.heartbeat) INTO v_soon;
        IF v_soon IS NOT NULL THEN
            v_streams := v_streams || {schema}.set_alarm(v_row.run_id, v_row.seq, v_now + v_soon * interval '1 millisecond');
        END IF;
    END LOOP;
    IF v_streams IS NOT NULL THEN
        PERFORM {schema}.wake(v_streams);
    END IF;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n WHERE NOT n = ANY (v_done));
END
$$;

-- Heartbeats of activities, each with what the next attempt is to be given (NULL leaves that as it is).
-- Answers per position: ok; cancelled; gone (the lease is no longer the live one).
CREATE FUNCTION {schema}.beat_activities(p_worker uuid, p_messages uuid[], p_leases uuid[], p_details bytea[])
RETURNS text[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_row record;
    v_now timestamptz := clock_timestamp();
    v_answer text[] := array_fill('gone'::text, ARRAY[cardinality(p_messages)]);
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    FOR v_row IN
        SELECT t.n, m.message_id, m.stream_id, m.run_id, m.seq, m.watched, m.due_at, t.details
        FROM unnest(p_messages, p_leases, p_details) WITH ORDINALITY t (message_id, lease, details, n)
        JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                               AND m.worker_id = v_worker.worker_id AND m.kind = 'a'
        ORDER BY m.message_id
        FOR NO KEY UPDATE OF m
    LOOP
        IF v_row.watched IS NOT TRUE THEN
            UPDATE {schema}.message m SET watched = true
            WHERE m.message_id = v_row.message_id AND m.stream_id = v_row.stream_id;
        END IF;
        INSERT INTO {schema}.activity AS a (run_id, seq, scheduled_at, beat_at, details)
        VALUES (v_row.run_id, v_row.seq, v_row.due_at, v_now, v_row.details)
        ON CONFLICT (run_id, seq) DO UPDATE SET beat_at = v_now, details = coalesce(excluded.details, a.details);
        v_answer[v_row.n] := CASE WHEN {schema}.is_cancelled(v_row.run_id, v_row.seq) THEN 'cancelled' ELSE 'ok' END;
    END LOOP;
    RETURN v_answer;
END
$$;

-- Internal: whether nobody wants an activity's outcome any more: it was cancelled, or its run has closed.
CREATE FUNCTION {schema}.is_cancelled(p_run uuid, p_seq int)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN EXISTS (SELECT 1 FROM {schema}.activity_cancel c WHERE c.run_id = p_run AND c.seq = p_seq)
           OR NOT EXISTS (SELECT 1 FROM {schema}.run r WHERE r.run_id = p_run AND r.status = 'running');
END
$$;

-- Internal: an activity's message, which the caller has locked, came back (p_attempt: which attempt that was), and waits to
-- be tried again: where it was cancelled, or its run has closed, it is not.
CREATE FUNCTION {schema}.drop_unwanted(p_run uuid, p_seq int, p_attempt int)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_message {schema}.message;
BEGIN
    -- What closes the run waits for no message: it has left this one, or finds it.
    PERFORM 1 FROM {schema}.run r WHERE r.run_id = p_run FOR KEY SHARE;
    IF NOT {schema}.is_cancelled(p_run, p_seq) THEN
        RETURN;
    END IF;
    DELETE FROM {schema}.message m
    WHERE m.message_id = (SELECT i.message_id FROM {schema}.activity_ids(p_run, p_seq) i) AND m.run_id = p_run AND m.kind = 'a'
    RETURNING m.* INTO v_message;
    PERFORM {schema}.forget_activity(p_run, p_seq);
    INSERT INTO {schema}.inbox (run_id, type, seq, name, attributes)
    SELECT p_run, 'ActivityFailed', p_seq, v_message.actor, json_build_object('failure', json_build_object(
        'type', 'ActivityCancelled', 'message', 'it was cancelled, and is not tried again', 'retryable', false,
        'attempt', p_attempt))
    FROM {schema}.run r WHERE r.run_id = p_run AND r.status = 'running';
    PERFORM {schema}.add_tasks(ARRAY[p_run]);
END
$$;

-- Which of the activities that run here shall end: by position, cancelled or gone (the lease is no longer the live one).
CREATE FUNCTION {schema}.doomed_activities(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS TABLE (n int, reason text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    RETURN QUERY
        SELECT x.n, x.reason FROM (
            SELECT t.n::int, CASE WHEN m.message_id IS NULL THEN 'gone'
                                  WHEN {schema}.is_cancelled(m.run_id, m.seq) THEN 'cancelled' END AS reason
            FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
            LEFT JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                                        AND m.worker_id = v_worker.worker_id) x
        WHERE x.reason IS NOT NULL;
END
$$;

-- What a running activity may know of itself: its run's workflow id, the details of the last heartbeat of an attempt
-- before this one, and when it and this attempt will be out of time (milliseconds since the epoch).
CREATE FUNCTION {schema}.activity_of_lease(p_worker uuid, p_message uuid, p_lease uuid)
RETURNS TABLE (workflow_id text, details bytea, deadline bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    RETURN QUERY
        SELECT r.workflow_id, a.details,
               (extract(epoch FROM least(
                   a.scheduled_at + a.schedule_to_close * interval '1 millisecond',
                   CASE WHEN a.lease = m.lease_token THEN a.started_at + a.start_to_close * interval '1 millisecond' END))
                * 1000)::bigint
        FROM {schema}.message m JOIN {schema}.run r ON r.run_id = m.run_id
        LEFT JOIN {schema}.activity a ON a.run_id = m.run_id AND a.seq = m.seq
        WHERE m.message_id = p_message AND m.lease_token = p_lease AND m.worker_id = v_worker.worker_id AND m.kind = 'a';
END
$$;

-- Alarms of activities: look at their limits.  An activity that is out of time ends, or begins its next attempt later;
-- the worker that has it is told.
-- Answers the positions whose lease is no longer the live one.
CREATE FUNCTION {schema}.expire_activities(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_row record;
    v_next timestamptz;
    v_done bigint[] := '{}';
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    FOR v_row IN
        SELECT t.n, m.message_id, m.stream_id, m.run_id, m.seq
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                               AND m.worker_id = v_worker.worker_id AND m.kind = 'd'
        ORDER BY m.message_id
    LOOP
        v_done := v_done || v_row.n;
        v_next := {schema}.expire_activity(v_row.run_id, v_row.seq);
        IF v_next IS NULL THEN
            DELETE FROM {schema}.message m WHERE m.message_id = v_row.message_id AND m.stream_id = v_row.stream_id;
        ELSE
            UPDATE {schema}.message m
            SET lease_token = NULL, worker_id = NULL, started = false, due_at = v_next
            WHERE m.message_id = v_row.message_id AND m.stream_id = v_row.stream_id;
        END IF;
    END LOOP;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n WHERE NOT n = ANY (v_done));
END
$$;

-- Internal: look at one activity's limits.  Answers when to look again; NULL when there is nothing to wait for (its next
-- attempt sets the alarm).
CREATE FUNCTION {schema}.expire_activity(p_run uuid, p_seq int)
RETURNS timestamptz
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_id uuid := (SELECT i.message_id FROM {schema}.activity_ids(p_run, p_seq) i);
    v_ms constant interval := interval '1 millisecond';
    v_message {schema}.message;
    v_activity record;
    v_running boolean;
    v_close timestamptz;
    v_begin timestamptz;
    v_end timestamptz;
    v_beat timestamptz;
    v_limit text;
    v_text text;
    v_due timestamptz;
BEGIN
    SELECT m.* INTO v_message FROM {schema}.message m
    WHERE m.message_id = v_id AND m.run_id = p_run AND m.kind = 'a' FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        IF EXISTS (SELECT 1 FROM {schema}.message m WHERE m.message_id = v_id AND m.run_id = p_run) THEN
            -- Somebody is at it.
            RETURN v_now + interval '100 milliseconds';
        END IF;
        DELETE FROM {schema}.activity a WHERE a.run_id = p_run AND a.seq = p_seq;
        RETURN NULL;
    END IF;
    SELECT a.* INTO v_activity FROM {schema}.activity a WHERE a.run_id = p_run AND a.seq = p_seq;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- One that waits for its token runs on without a lease.
    v_running := coalesce(v_activity.lease = v_message.lease_token,
                          v_message.lease_token IS NULL AND v_activity.token IS NOT NULL
                          AND v_activity.token_attempt = v_message.attempt, false);
    v_close := v_activity.scheduled_at + v_activity.schedule_to_close * v_ms;
    IF v_running THEN
        v_end := v_activity.started_at + v_activity.start_to_close * v_ms;
        v_beat := greatest(v_activity.started_at, v_activity.beat_at) + v_activity.heartbeat * v_ms;
    ELSE
        v_begin := greatest(v_message.due_at, v_activity.started_at) + v_activity.schedule_to_start * v_ms;
    END IF;
    v_limit := CASE WHEN v_close <= v_now THEN 'schedule_to_close' WHEN v_end <= v_now THEN 'start_to_close'
                    WHEN v_begin <= v_now THEN 'schedule_to_start' WHEN v_beat <= v_now THEN 'heartbeat' END;
    IF v_limit IS NULL THEN
        RETURN least(v_close, v_end, v_begin, v_beat);
    END IF;
    v_text := CASE v_limit
        WHEN 'schedule_to_close' THEN format('it did not end within %s s of being scheduled', v_activity.schedule_to_close / 1000.0)
        WHEN 'schedule_to_start' THEN format('no worker began it within %s s', v_activity.schedule_to_start / 1000.0)
        WHEN 'start_to_close' THEN format('an attempt did not end within %s s', v_activity.start_to_close / 1000.0)
        ELSE format('it sent no heartbeat for %s s', v_activity.heartbeat / 1000.0) END;
    v_text := v_limit || ': ' || regexp_replace(v_text, '(\.\d*?)0+ s', '\1 s');
    v_text := replace(v_text, '. s', ' s');
    PERFORM {schema}.tell_workers(ARRAY[v_message.worker_id]);
    IF v_limit IN ('start_to_close', 'heartbeat') AND (v_message.attempt >= v_activity.retry_attempts) IS NOT TRUE
       AND v_message.abort_at IS NULL AND NOT {schema}.is_cancelled(p_run, p_seq) THEN
        v_due := v_now + least(
            v_activity.retry_initial * power(v_activity.retry_coefficient, least(v_message.attempt - 1, 60)),
            v_activity.retry_maximum, 315360000000) * v_ms;
        UPDATE {schema}.message m
        SET lease_token = NULL, worker_id = NULL, started = false, attempt = m.attempt + 1, due_at = v_due,
            last_failure = 'Timeout: ' || v_text
        WHERE m.message_id = v_message.message_id AND m.stream_id = v_message.stream_id;
        PERFORM {schema}.wake(ARRAY[v_message.stream_id]);
        RETURN least(v_close, v_due + v_activity.schedule_to_start * v_ms);
    END IF;
    DELETE FROM {schema}.message m WHERE m.message_id = v_message.message_id AND m.stream_id = v_message.stream_id;
    DELETE FROM {schema}.activity a WHERE a.run_id = p_run AND a.seq = p_seq;
    DELETE FROM {schema}.activity_cancel c WHERE c.run_id = p_run AND c.seq = p_seq;
    INSERT INTO {schema}.inbox (run_id, type, seq, name, attributes)
    SELECT p_run, 'ActivityTimedOut', p_seq, v_message.actor, json_build_object('failure', json_strip_nulls(json_build_object(
        'type', 'Timeout', 'message', v_text, 'retryable', v_limit IN ('start_to_close', 'heartbeat'),
        'attempt', v_message.attempt, 'timeout', v_limit,
        'cause', CASE WHEN v_message.last_failure IS NOT NULL THEN json_build_object(
            'type', split_part(v_message.last_failure, ': ', 1),
            'message', substr(v_message.last_failure, length(split_part(v_message.last_failure, ': ', 1)) + 3)) END)))
    FROM {schema}.run r WHERE r.run_id = p_run AND r.status = 'running';
    PERFORM {schema}.add_tasks(ARRAY[p_run]);
    RETURN NULL;
END
$$;

-- What a run waits for: activities, timers, children and escalations, in the order in which its code asked.
-- next_attempt_at: when it is due, while it waits for that; attempt: from 1; details: of an activity's last heartbeat.
CREATE FUNCTION {schema}.pending_of(p_run uuid)
RETURNS TABLE (seq int, kind text, name text, attempt int, last_failure text, next_attempt_at timestamptz, details bytea)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_caller record;
    v_run {schema}.run := {schema}.find_run(p_run, NULL, 'r');
BEGIN
    IF v_run.status IS DISTINCT FROM 'running' THEN
        RETURN;
    END IF;
    SELECT * INTO v_caller FROM {schema}.caller();
    RETURN QUERY
        SELECT e.seq, CASE e.type WHEN 'ActivityScheduled' THEN 'activity' ELSE 'timer' END,
               CASE e.type WHEN 'ActivityScheduled' THEN m.actor ELSE e.name END, m.attempt, m.last_failure,
               CASE WHEN m.lease_token IS NULL AND m.due_at > clock_timestamp()
                     AND (a.token IS NOT NULL AND a.token_attempt = m.attempt) IS NOT TRUE THEN m.due_at END,
               a.details
        FROM {schema}.event e
        JOIN {schema}.message m ON m.message_id = (SELECT d.message_id FROM {schema}.activity_ids(e.run_id, e.seq) d)
                               AND m.run_id = e.run_id
        LEFT JOIN {schema}.activity a ON a.run_id = e.run_id AND a.seq = e.seq
        WHERE e.run_id = v_run.run_id AND e.type IN ('ActivityScheduled', 'TimerStarted')
        UNION ALL
        SELECT c.parent_seq, 'child', c.name, NULL::int,
               -- What goes wrong on another stream is told there.
               CASE WHEN v_caller.is_admin OR {schema}.may_read(v_caller.principal_id, c.stream_id, c.principal_id)
                    THEN c.task_failure END,
               m.due_at, NULL::bytea
        FROM {schema}.run c
        LEFT JOIN {schema}.message m ON m.message_id = c.run_id AND m.run_id = c.run_id AND m.lease_token IS NULL
                                    AND m.due_at > clock_timestamp()
        WHERE c.parent_run_id = v_run.run_id AND c.status = 'running'
        UNION ALL
        SELECT o.seq, 'escalation', o.role, NULL::int, NULL::text, o.times_out_at, NULL::bytea
        FROM {schema}.escalation o WHERE o.run_id = v_run.run_id AND o.status = 'open'
        ORDER BY 1;
END
$$;
