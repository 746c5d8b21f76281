-- What messages leave behind: results, what their hooks sent, the count of their group; and who waits for a result.

-- What these messages leave behind, under their leases.  Called in one transaction with what ends them (ack, reschedule,
-- bury, complete_activities), before it: they stand or fall together, also when the lease is gone.
--
-- p_member[i]: message i has succeeded as a member of its group: it is counted, once, because its row ends with it.
-- The other arrays name their message by position: results (time to live in milliseconds), and messages to send; of the
-- last member of a group those with p_send_last too: the completion's callbacks.
--
-- Answers per message 1: stored; 0: its lease is gone; -1: it may not send what it wants to; -2: the login has as much as
-- its max_live allows.  The message then goes back, as with fail_settling, and whatever was to end it finds its lease gone.
CREATE FUNCTION {schema}.leave(
    p_worker uuid, p_messages uuid[], p_leases uuid[], p_member boolean[],
    p_result_of int[], p_result_key text[], p_result_value bytea[], p_result_ttl bigint[],
    p_send_of int[], p_send_last boolean[], p_send_stream int[], p_send_message uuid[], p_send_actor text[],
    p_send_priority int[], p_send_delay bigint[], p_send_payload bytea[], p_send_group uuid[], p_send_key text[],
    p_send_conflict text[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_answer int[] := array_fill(0, ARRAY[cardinality(p_messages)]);
    v_stream int[] := array_fill(0, ARRAY[cardinality(p_messages)]);
    v_group uuid[] := array_fill(NULL::uuid, ARRAY[cardinality(p_messages)]);
    v_lot text[] := array_fill(NULL::text, ARRAY[cardinality(p_messages)]);
    v_own int[] := v_stream;
    v_ending int := 0;
    v_sends int := 0;
    v_results int := 0;
    v_may int[];
    v_last int[] := '{}';
    v_left bigint;
    v_row record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    FOR v_row IN
        SELECT t.n, m.stream_id, m.group_id, m.lot
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                               AND m.worker_id = v_worker.worker_id
        ORDER BY t.n
        FOR UPDATE OF m
    LOOP
        v_answer[v_row.n] := 1;
        v_stream[v_row.n] := v_row.stream_id;
        v_group[v_row.n] := v_row.group_id;
        v_lot[v_row.n] := v_row.lot;
        IF starts_with(v_row.lot, session_user || '/') AND NOT p_messages[v_row.n] = ANY (p_messages[1:v_row.n - 1]) THEN
            -- One of the caller's own: it ends just after this, and what follows takes its place.
            v_own[v_row.n] := 1;
            v_ending := v_ending + 1;
        END IF;
    END LOOP;

    IF starts_with(session_user, 'dd_') AND NOT (
        {schema}.has_room(session_user, 'message', cardinality(p_send_of), NULL, v_ending)
        AND {schema}.has_room(session_user, 'result', cardinality(p_result_of)))
    THEN
        -- Those that there is room for, in their turn: who asks for much takes nothing from the others.
        v_ending := 0;
        FOR v_row IN
            SELECT t.n::int, (SELECT count(*) FROM unnest(p_send_of) s (of) WHERE s.of = t.n)::int AS sends,
                   (SELECT count(*) FROM unnest(p_result_of) r (of) WHERE r.of = t.n)::int AS results
            FROM unnest(v_answer) WITH ORDINALITY t (answer, n)
            WHERE t.answer = 1 AND t.n = ANY (p_send_of || p_result_of) ORDER BY t.n
        LOOP
            IF {schema}.has_room(session_user, 'message', v_sends + v_row.sends, NULL, v_ending + v_own[v_row.n])
               AND {schema}.has_room(session_user, 'result', v_results + v_row.results)
            THEN
                v_sends := v_sends + v_row.sends;
                v_results := v_results + v_row.results;
                v_ending := v_ending + v_own[v_row.n];
                CONTINUE;
            END IF;
            v_answer[v_row.n] := -2;
            PERFORM {schema}.put_back(
                v_worker.worker_id, p_messages[v_row.n:v_row.n], p_leases[v_row.n:v_row.n],
                ARRAY['what it leaves behind could not be stored: its worker''s login has as much as its max_live allows']);
        END LOOP;
    END IF;
    IF cardinality(p_send_of) > 0 THEN
        v_may := {schema}.permitted(v_worker.principal_id, v_worker.is_admin, p_send_stream, 'p');
        FOR v_row IN
            SELECT DISTINCT s.of FROM unnest(p_send_of, p_send_stream, p_send_message) s (of, stream_id, message_id)
            WHERE v_answer[s.of] = 1
              AND ((s.stream_id = ANY (v_may)) IS NOT TRUE OR substr(s.message_id::text, 15, 1) = '8')
        LOOP
            v_answer[v_row.of] := -1;
            PERFORM {schema}.put_back(
                v_worker.worker_id, p_messages[v_row.of:v_row.of], p_leases[v_row.of:v_row.of],
                ARRAY['what follows it could not be stored: no such stream, or its worker may not send to it']);
        END LOOP;
    END IF;

    IF cardinality(p_result_of) > 0 THEN
        PERFORM {schema}.keep_results(
            array_agg(r.key ORDER BY r.n), array_agg(v_stream[r.of] ORDER BY r.n), array_agg(r.value ORDER BY r.n),
            array_agg(r.ttl ORDER BY r.n))
        FROM unnest(p_result_of, p_result_key, p_result_value, p_result_ttl) WITH ORDINALITY r (of, key, value, ttl, n)
        WHERE v_answer[r.of] = 1
        HAVING count(*) > 0;
    END IF;

    -- Groups in one order, so that no two transactions wait for each other.  A barrier that has expired still counts.
    -- What a provisioned login has made a member of a group counts for its principal's own groups, and for nobody else's.
    FOR v_row IN
        SELECT v_group[t.n] AS id, g.principal_id AS space, min(t.n)::int AS first, count(*) AS members
        FROM unnest(p_member) WITH ORDINALITY t (member, n)
        LEFT JOIN {schema}.login g ON g.login = left(v_lot[t.n], -3)
        WHERE t.member AND v_answer[t.n] = 1 AND v_group[t.n] IS NOT NULL
        GROUP BY 1, 2 ORDER BY 1, 2
    LOOP
        UPDATE {schema}.limiter l SET value = l.value - v_row.members
        WHERE l.key = v_row.id::text AND l.value > 0
          AND l.space = coalesce(v_row.space, (SELECT min(o.space) FROM {schema}.limiter o WHERE o.key = v_row.id::text))
        RETURNING l.value INTO v_left;
        IF FOUND AND v_left <= 0 THEN
            v_last := v_last || v_row.first;
        END IF;
    END LOOP;

    IF cardinality(p_send_of) > 0 THEN
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, group_id)
        SELECT s.message_id, s.stream_id, s.priority,
               clock_timestamp() + least(greatest(s.delay, 0), 315360000000) * interval '1 millisecond'
                   + s.n * interval '1 microsecond',
               clock_timestamp(), s.actor, s.payload, s.group_id
        FROM unnest(p_send_of, p_send_last, p_send_stream, p_send_message, p_send_actor, p_send_priority, p_send_delay,
                    p_send_payload, p_send_group, p_send_key)
             WITH ORDINALITY s (of, last, stream_id, message_id, actor, priority, delay, payload, group_id, key, n)
        WHERE v_answer[s.of] = 1 AND (NOT s.last OR s.of = ANY (v_last)) AND s.key IS NULL
        ON CONFLICT (message_id, stream_id) DO NOTHING;
        FOR v_row IN
            SELECT * FROM unnest(p_send_of, p_send_last, p_send_stream, p_send_message, p_send_actor, p_send_priority,
                                 p_send_delay, p_send_payload, p_send_group, p_send_key, p_send_conflict)
                WITH ORDINALITY s (of, last, stream_id, message_id, actor, priority, delay, payload, group_id, key, conflict, n)
            WHERE v_answer[s.of] = 1 AND (NOT s.last OR s.of = ANY (v_last)) AND s.key IS NOT NULL ORDER BY s.n
        LOOP
            PERFORM {schema}.store_keyed(v_row.stream_id, v_row.message_id, v_row.actor, v_row.priority, v_row.delay,
                                         v_row.payload, v_row.group_id, v_row.key, v_row.conflict);
        END LOOP;
        PERFORM {schema}.wake(ARRAY(
            SELECT DISTINCT s.stream_id FROM unnest(p_send_of, p_send_last, p_send_stream) s (of, last, stream_id)
            WHERE v_answer[s.of] = 1 AND (NOT s.last OR s.of = ANY (v_last))));
    END IF;
    IF starts_with(session_user, 'dd_') THEN
        -- The first message that goes on for a member takes its place, as if whoever sent that one had sent it.
        UPDATE {schema}.message m SET lot = v_lot[f.of]
        FROM (SELECT DISTINCT ON (s.of) s.of, s.message_id, s.stream_id
              FROM unnest(p_send_of, p_send_last, p_send_stream, p_send_message, p_send_group)
                   WITH ORDINALITY s (of, last, stream_id, message_id, group_id, n)
              WHERE v_answer[s.of] = 1 AND NOT s.last AND s.group_id = v_group[s.of] ORDER BY s.of, s.n) f
        WHERE m.message_id = f.message_id AND m.stream_id = f.stream_id AND m.lease_token IS NULL
          AND m.group_id = v_group[f.of] AND m.lot IS DISTINCT FROM v_lot[f.of]
          AND starts_with(m.lot, session_user || '/');
        -- Once: whoever calls this without ending them, as often as he likes, has none of it twice.
        UPDATE {schema}.message m SET group_id = NULL
        FROM unnest(p_messages, p_leases, p_member) WITH ORDINALITY t (message_id, lease, member, n)
        WHERE v_answer[t.n] = 1 AND v_group[t.n] IS NOT NULL AND m.message_id = t.message_id AND m.lease_token = t.lease
          AND (t.member OR EXISTS (
              SELECT 1 FROM unnest(p_send_of, p_send_group) s (of, group_id) WHERE s.of = t.n AND s.group_id = v_group[t.n]));
    END IF;
    RETURN v_answer;
END
$$;

-- These deliveries have ended, and their end cannot be stored: what their hooks want to leave behind is refused.  They go
-- back, to run again, and after a few times in a row to the dead letters.
-- Answers the positions whose lease is no longer the live one.
CREATE FUNCTION {schema}.fail_settling(p_worker uuid, p_messages uuid[], p_leases uuid[], p_failures text[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_worker record;
    v_done bigint[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    v_done := {schema}.put_back(v_worker.worker_id, p_messages, p_leases, p_failures);
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n WHERE NOT n = ANY (v_done));
END
$$;

-- Internal: what fail_settling says, for a worker whose leases these are.  A message is tried again in 30 seconds, a
-- minute, two, four; the fifth time in a row it is a dead letter, and an activity fails in its run.
-- Answers the positions whose lease was live.
CREATE FUNCTION {schema}.put_back(p_worker_id bigint, p_messages uuid[], p_leases uuid[], p_failures text[])
RETURNS bigint[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    -- Where the dead letters of the caller are too many, what cannot be settled goes on being tried.
    c_times CONSTANT int :=
        CASE WHEN (NOT starts_with(session_user, 'dd_') OR {schema}.has_room(session_user, 'dead_letter', cardinality(p_messages))) THEN 5 ELSE 32767 END;
    v_now timestamptz := clock_timestamp();
    v_back bigint[];
    v_gone bigint[];
    v_streams int[];
    v_runs uuid[];
BEGIN
    WITH back AS (
        UPDATE {schema}.message m
        SET lease_token = NULL, worker_id = NULL, started = false, attempt = m.attempt + 1,
            unsettled = coalesce(m.unsettled, 0) + 1,
            last_failure = left(t.failure, 1000000) || format(' (time %s of %s)', coalesce(m.unsettled, 0) + 1, c_times),
            -- What was aborted meanwhile does not wait for its end.
            due_at = v_now + CASE WHEN m.abort_at IS NULL THEN power(2, least(coalesce(m.unsettled, 0), 7)) * interval '30 seconds'
                                  ELSE interval '0' END
        FROM unnest(p_messages, p_leases, p_failures) WITH ORDINALITY t (message_id, lease, failure, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = p_worker_id
          AND m.kind IN ('m', 'j', 'a') AND coalesce(m.unsettled, 0) + 1 < c_times
        RETURNING t.n, m.stream_id)
    SELECT array_agg(b.n), array_agg(DISTINCT b.stream_id) INTO v_back, v_streams FROM back b;
    IF cardinality(v_back) = cardinality(p_messages) THEN
        PERFORM {schema}.wake(v_streams);
        RETURN v_back;
    END IF;
    WITH gone AS (
        DELETE FROM {schema}.message m
        USING unnest(p_messages, p_leases, p_failures) WITH ORDINALITY t (message_id, lease, failure, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = p_worker_id
          AND m.kind IN ('m', 'j', 'a')
        RETURNING t.n, m.*, left(t.failure, 1000000) || format(' (%s times)', c_times) AS failure),
    buried AS (
        INSERT INTO {schema}.dead_letter (
            message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, failure, payload, kind, group_id, unique_key)
        SELECT g.message_id, g.stream_id, g.priority, g.enqueued_at, g.attempt, g.deaths, g.actor,
               CASE WHEN g.abort_at IS NULL THEN 'unsettled' ELSE 'aborted' END, g.failure, g.payload, g.kind, g.group_id, g.unique_key
        FROM gone g WHERE g.kind IN ('m', 'j')),
    told AS (
        INSERT INTO {schema}.inbox (run_id, type, seq, name, attributes)
        SELECT g.run_id, 'ActivityFailed', g.seq, g.actor, json_build_object('failure', json_build_object(
            'type', 'NotSettled', 'message', g.failure, 'retryable', false, 'attempt', g.attempt))
        FROM gone g JOIN {schema}.run r ON r.run_id = g.run_id AND r.status = 'running' WHERE g.kind = 'a'
        RETURNING run_id)
    SELECT (SELECT array_agg(g.n) FROM gone g), (SELECT array_agg(DISTINCT t.run_id) FROM told t) INTO v_gone, v_runs;
    IF v_runs IS NOT NULL THEN
        PERFORM {schema}.add_tasks(v_runs);
    END IF;
    IF v_streams IS NOT NULL THEN
        PERFORM {schema}.wake(v_streams);
    END IF;
    RETURN coalesce(v_back, '{}') || coalesce(v_gone, '{}');
END
$$;

-- Internal: keep results (time to live in milliseconds), and wake who waits for them.
CREATE FUNCTION {schema}.keep_results(p_keys text[], p_streams int[], p_values bytea[], p_ttls bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_channel uuid;
BEGIN
    INSERT INTO {schema}.result AS r (key, stream_id, expires_at, value)
    -- One statement cannot change a row twice: of two results with one key the later counts.
    SELECT DISTINCT ON (t.key, t.stream_id) t.key, t.stream_id,
           v_now + least(greatest(t.ttl, 0), 315360000000) * interval '1 millisecond', t.value
    FROM unnest(p_keys, p_streams, p_values, p_ttls) WITH ORDINALITY t (key, stream_id, value, ttl, n)
    ORDER BY t.key, t.stream_id, t.n DESC
    ON CONFLICT (key, stream_id) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at;
    -- Not without end: anybody may wait for a key that he knows.  Those who are left out look by themselves.
    FOR v_channel IN
        SELECT DISTINCT c.channel
        FROM (SELECT w.channel FROM {schema}.result_waiter w WHERE w.key = ANY (p_keys) AND w.until > v_now LIMIT 10000) c
    LOOP
        IF pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('durable:c' || v_channel, '');
        END IF;
    END LOOP;
END
$$;

-- Keep a result outside of any delivery.  It lies with no stream: an administrator's may be read by administrators,
-- any other principal's by itself.
CREATE FUNCTION {schema}.store_result(p_key text, p_value bytea, p_ttl bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    v_space int := {schema}.space();
BEGIN
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('result', 1);
    END IF;
    PERFORM {schema}.keep_results(ARRAY[p_key], ARRAY[-v_space], ARRAY[p_value], ARRAY[p_ttl]);
END
$$;

-- Those of these results that are there and not expired (n: position).  p_streams[i] is the name of the stream that has
-- the message whose result p_keys[i] is: nobody else can have stored it.  Besides, and for NULL alone, what was kept
-- outside of any delivery: by administrators for administrators, by any other principal for itself.
-- p_channel: where NULL, that is all; else the channel is notified when one of the others comes, within p_wait milliseconds.
-- What was being stored while the wish was being committed is found by asking again.
CREATE FUNCTION {schema}.get_results(p_keys text[], p_streams text[], p_channel uuid, p_wait bigint)
RETURNS TABLE (n int, value bytea)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_caller record;
    v_own int;
    v_until timestamptz := clock_timestamp() + least(greatest(p_wait, 0), 3600000) * interval '1 millisecond';
BEGIN
    IF cardinality(p_keys) > 10000 THEN
        RAISE EXCEPTION 'a call has at most 10000 items, not %', cardinality(p_keys) USING ERRCODE = '54000';
    END IF;
    SELECT * INTO v_caller FROM {schema}.caller();
    v_own := -{schema}.space();
    -- Whoever waits too often is not told, and finds out by looking.
    IF p_channel IS NOT NULL AND (NOT starts_with(session_user, 'dd_') OR {schema}.has_room(session_user, 'result_waiter', cardinality(p_keys))) THEN
        INSERT INTO {schema}.result_waiter AS w (key, channel, until)
        SELECT DISTINCT k, p_channel, v_until FROM unnest(p_keys) k ORDER BY 1
        ON CONFLICT (key, channel) DO UPDATE SET until = excluded.until;
    END IF;
    RETURN QUERY
        SELECT DISTINCT ON (t.n) t.n::int, r.value
        FROM unnest(p_keys, p_streams) WITH ORDINALITY t (key, stream, n)
        JOIN {schema}.result r ON r.key = t.key
        LEFT JOIN {schema}.stream s ON s.name = t.stream
        WHERE r.expires_at > clock_timestamp()
          AND (r.stream_id = v_own OR r.stream_id = s.stream_id AND (v_caller.is_admin OR EXISTS (
              SELECT 1 FROM {schema}.stream_grant g
              WHERE g.principal_id = v_caller.principal_id AND g.stream_id = r.stream_id AND (g.consume OR g.produce))))
        ORDER BY t.n, r.expires_at DESC;
END
$$;
