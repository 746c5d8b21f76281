-- Streams: enqueue, claim, settle (ack, reschedule, release, bury), workers and reclaim.
--
-- Arguments are parallel arrays, one element an item; an answer names the items by position, from 1.  A procedure
-- never fails because of one item's lease or stream: the item's answer says so and its neighbours go on.
-- The planner settings keep the plans on their indexes also while a table's statistics say that it is empty.

-- The ids of streams.  An administrator's streams come into being here; to any other login a stream that it has no
-- grant for is as missing as one that does not exist (DD001).
CREATE FUNCTION {schema}.open_streams(p_names text[])
RETURNS TABLE (name text, stream_id int)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_caller record;
    v_found int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    IF v_caller.is_admin THEN
        INSERT INTO {schema}.stream (name)
        SELECT DISTINCT n FROM unnest(p_names) n
        WHERE NOT EXISTS (SELECT 1 FROM {schema}.stream s WHERE s.name = n)
        ORDER BY n
        ON CONFLICT DO NOTHING;
    END IF;
    IF v_caller.is_admin THEN
        RETURN QUERY SELECT s.name, s.stream_id FROM {schema}.stream s WHERE s.name = ANY (p_names);
    ELSE
        -- First what is the caller's (that is what OFFSET is for), then what it is called: the server's statistics tell
        -- everybody how many rows his own transaction has fetched.
        RETURN QUERY
            SELECT o.name, o.stream_id FROM (
                SELECT s.name, s.stream_id FROM {schema}.stream s
                WHERE s.stream_id = ANY (ARRAY(
                    SELECT g.stream_id FROM {schema}.stream_grant g
                    WHERE g.principal_id = v_caller.principal_id AND (g.consume OR g.produce)))
                OFFSET 0) o
            WHERE o.name = ANY (p_names);
    END IF;
    GET DIAGNOSTICS v_found = ROW_COUNT;
    IF v_found < (SELECT count(DISTINCT n) FROM unnest(p_names) n) THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
END
$$;

-- Store messages.  Answers 1: stored; 0: the stream has a live message with this id already; -1: not permitted.
-- Ids of version 8 are the database's own: it derives them from a run, and nobody may take them beforehand.
-- Messages of one call keep their order: each is due a microsecond after the one before it.
CREATE FUNCTION {schema}.enqueue_messages(
    p_sender uuid, p_batch bigint,
    p_streams int[], p_messages uuid[], p_actors text[], p_priorities int[], p_delays bigint[], p_payloads bytea[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_caller record;
    v_may int[];
    v_now timestamptz := clock_timestamp();
    v_answers int[];
    v_stored uuid[];
    v_on int[];
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    v_may := {schema}.permitted(v_caller.principal_id, v_caller.is_admin, p_streams, 'p');
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('message', cardinality(p_messages));
    END IF;
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_messages));
    -- Not in a transaction of the caller's own, which may have many of these calls: the block is a subtransaction.
    IF p_sender IS NOT NULL AND v_may @> p_streams AND NOT EXISTS (
        SELECT 1 FROM unnest(p_messages) t (message_id) WHERE substr(t.message_id::text, 15, 1) IS NOT DISTINCT FROM '8')
    THEN
        BEGIN
            -- As nearly always, all are new: ON CONFLICT would log every row twice.  A transaction of the caller's own
            -- may send again and again, and each time would be one more subtransaction of it.
            INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)
            SELECT t.message_id, t.stream_id, t.priority,
                   v_now + least(greatest(t.delay, 0), 315360000000) * interval '1 millisecond'
                       + t.n * interval '1 microsecond',
                   v_now, t.actor, t.payload
            FROM unnest(p_messages, p_streams, p_priorities, p_delays, p_actors, p_payloads)
                 WITH ORDINALITY t (message_id, stream_id, priority, delay, actor, payload, n);
            v_answers := array_fill(1, ARRAY[cardinality(p_messages)]);
        EXCEPTION WHEN unique_violation THEN
            NULL;
        END;
    END IF;
    IF v_answers IS NULL THEN
        WITH stored AS (
            INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)
            SELECT t.message_id, t.stream_id, t.priority,
                   v_now + least(greatest(t.delay, 0), 315360000000) * interval '1 millisecond'
                       + t.n * interval '1 microsecond',
                   v_now, t.actor, t.payload
            FROM unnest(p_messages, p_streams, p_priorities, p_delays, p_actors, p_payloads)
                 WITH ORDINALITY t (message_id, stream_id, priority, delay, actor, payload, n)
            WHERE t.stream_id = ANY (v_may) AND substr(t.message_id::text, 15, 1) IS DISTINCT FROM '8'
            ON CONFLICT (message_id, stream_id) DO NOTHING
            RETURNING message_id, stream_id)
        SELECT array_agg(s.message_id), array_agg(s.stream_id) INTO v_stored, v_on FROM stored s;
        v_answers := ARRAY(
            SELECT CASE WHEN (t.stream_id = ANY (v_may)) IS NOT TRUE OR substr(t.message_id::text, 15, 1) = '8' THEN -1
                   WHEN EXISTS (SELECT 1 FROM unnest(v_stored, v_on) u (message_id, stream_id)
                                WHERE u.message_id = t.message_id AND u.stream_id = t.stream_id) THEN 1 ELSE 0 END
            FROM unnest(p_messages, p_streams) WITH ORDINALITY t (message_id, stream_id, n) ORDER BY t.n);
    END IF;
    -- Asked here, it is less than the call where nobody waits.
    IF p_sender IS NULL OR EXISTS (
        SELECT 1 FROM {schema}.worker w WHERE w.waiting_until > v_now AND w.stream_ids && v_may)
    THEN
        PERFORM {schema}.wake(v_may, p_sender IS NULL);
    END IF;
    RETURN v_answers;
END
$$;

-- Store one message: as enqueue_messages does, for the send that is alone in its transaction, in less than half the time.
-- An unknown login is answered like one without the grant.
CREATE FUNCTION {schema}.enqueue_message(
    p_sender uuid, p_batch bigint, p_stream int, p_message uuid, p_actor text, p_priority int, p_delay bigint, p_payload bytea)
RETURNS int
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_answer int;
BEGIN
    -- Nested like this it takes half as long as a join.
    IF (EXISTS (SELECT 1 FROM {schema}.stream s WHERE s.stream_id = p_stream)
        AND (SELECT p.is_admin OR EXISTS (
                 SELECT 1 FROM {schema}.stream_grant g
                 WHERE g.principal_id = p.principal_id AND g.stream_id = p_stream AND g.produce)
             FROM {schema}.principal p WHERE p.principal_id = (
                 SELECT l.principal_id FROM {schema}.login l
                 WHERE l.login = session_user AND (l.expires_at IS NULL OR l.expires_at > v_now)))) IS NOT TRUE
       OR substr(p_message::text, 15, 1) = '8'
    THEN
        RETURN -1;
    END IF;
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('message', 1);
    END IF;
    UPDATE {schema}.sender s SET batch = p_batch, at = v_now
    WHERE s.sender = p_sender AND s.batch < p_batch AND s.login = session_user;
    IF NOT FOUND THEN
        -- The sender's first batch, or one that was given up.
        PERFORM {schema}.begin_batch(p_sender, p_batch, 1);
    END IF;
    INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)
    VALUES (p_message, p_stream, p_priority,
            v_now + least(greatest(p_delay, 0), 315360000000) * interval '1 millisecond', v_now, p_actor, p_payload)
    ON CONFLICT (message_id, stream_id) DO NOTHING;
    v_answer := FOUND::int;
    IF p_sender IS NULL OR EXISTS (
        SELECT 1 FROM {schema}.worker w WHERE w.waiting_until > v_now AND p_stream = ANY (w.stream_ids))
    THEN
        PERFORM {schema}.wake(ARRAY[p_stream], p_sender IS NULL);
    END IF;
    RETURN v_answer;
END
$$;

-- After a lost answer: was this batch committed?  If it was not, it is given up: it can no longer be committed.
-- refused: the messages of the sender's last call of enqueue_keyed that were not stored.
-- May be asked again, when its own answer is lost: the answer stays the same.
CREATE FUNCTION {schema}.batch_outcome(p_sender uuid, p_batch bigint, OUT committed boolean, OUT refused uuid[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
BEGIN
    PERFORM {schema}.caller();
    IF starts_with(session_user, 'dd_') AND NOT EXISTS (SELECT 1 FROM {schema}.sender s WHERE s.sender = p_sender) THEN
        PERFORM {schema}.check_room('sender', 1);
    END IF;
    INSERT INTO {schema}.sender AS s (sender, login, batch, given_up, at)
    VALUES (p_sender, session_user, p_batch, p_batch, clock_timestamp())
    ON CONFLICT (sender) DO UPDATE SET batch = excluded.batch, given_up = excluded.batch, at = excluded.at
    WHERE s.batch < excluded.batch AND s.login = excluded.login;
    IF NOT FOUND THEN
        SELECT s.refused INTO batch_outcome.refused
        FROM {schema}.sender s WHERE s.sender = p_sender AND s.login = session_user AND s.given_up <> p_batch;
    END IF;
    committed := batch_outcome.refused IS NOT NULL;
END
$$;

-- Hand out at most p_limits[i] messages of p_streams[i], and p_total in all, to this worker: due, of streams that are
-- not paused, by priority and then by due time.  Each delivery has a new lease token.
-- Ticks of schedules, alarms of activities and deadlines of runs take nobody's place (no thread runs them): up to a hundred come beside the
-- messages.
--
-- p_acked, p_acked_leases: deliveries that are done, acknowledged first: a claim carries them, so that a busy worker's turn
-- is one statement.
-- waited: for how many seconds the message has been due.
-- p_done: messages that the worker has finished since its last claim (bookkeeping of what it holds).
-- p_wait: milliseconds it will wait if there is nothing; while it waits, senders wake it.
-- The last row has no message: it tells in how many milliseconds the next message is due, and which of p_acked (by
-- position) were not under their live lease.
-- Its plans are made once: they are the same whatever the arguments, and to make them anew would take a third of the time
-- of a small claim.
CREATE FUNCTION {schema}.claim(
    p_worker uuid, p_acked uuid[], p_acked_leases uuid[], p_streams int[], p_limits int[], p_total int, p_done uuid[],
    p_wait int)
RETURNS TABLE (
    message_id uuid, lease uuid, stream_id int, kind text, run_id uuid, seq int, attempt int, reclaimed boolean,
    actor text, payload bytea, waited double precision, next_due bigint, refused int[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_worker_id bigint;
    v_now timestamptz := clock_timestamp();
    v_kinds "char"[];
    v_may int[];
    v_left int;
    v_priority int;
    v_priorities int;
    v_rows int;
    v_ticks int := 0;
    v_before int;
    v_due timestamptz;
    v_next timestamptz;
    v_tids tid[];
    v_found uuid[];
    v_claimed uuid[] := '{}';
    v_done uuid[];
    v_kept uuid[] := '{}';
    v_refused int[];
    -- What no other claim's leases begin with, and each counts up from here: a random one for each takes thrice as long.
    v_base text := gen_random_uuid()::text;
    v_number int;
    i int;
BEGIN
    -- What authenticate() and permitted() answer, in one statement: an idle worker's claim begins with it, and somebody
    -- waits for that one.
    SELECT w.worker_id,
           -- What such a worker takes; NULL: everything.  Ticks and notes are taken by whoever comes, and so are the
           -- alarms of activities: they lie on the run's stream, where perhaps no worker takes activities.
           CASE p.kind WHEN 'activity' THEN '{m,j,a,p,d,c,n}'::"char"[] WHEN 'workflow' THEN '{s,t,w,q,e,d,c,n}'::"char"[] END,
           ARRAY(
               SELECT s.stream_id FROM {schema}.stream s
               WHERE s.stream_id = ANY (p_streams) AND NOT s.paused
                 AND (p.is_admin OR EXISTS (
                     SELECT 1 FROM {schema}.stream_grant g
                     WHERE g.principal_id = p.principal_id AND g.stream_id = s.stream_id AND g.consume)))
    INTO v_worker_id, v_kinds, v_may
    FROM {schema}.worker w
    JOIN {schema}.login l ON l.login = w.login AND (l.expires_at IS NULL OR l.expires_at > v_now)
    JOIN {schema}.principal p ON p.principal_id = l.principal_id
    WHERE w.token = p_worker AND w.login = session_user;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this worker is not registered, or was declared dead' USING ERRCODE = 'DD002';
    END IF;
    IF cardinality(p_acked) > 0 THEN
        v_refused := {schema}.ack(p_worker, p_acked, p_acked_leases);
    END IF;
    FOR i IN 1 .. cardinality(p_streams) LOOP
        v_left := least(p_limits[i], p_total - cardinality(v_claimed) + v_ticks, 10000);
        CONTINUE WHEN v_left <= 0 OR NOT p_streams[i] = ANY (v_may);
        -- One priority after the other: within one, what is due stands before what is delayed, so that a million
        -- delayed messages are never looked at.
        SELECT m.priority INTO v_priority FROM {schema}.message m
        WHERE m.stream_id = p_streams[i] ORDER BY m.priority LIMIT 1;
        v_priorities := 0;
        WHILE v_priority IS NOT NULL AND v_left > 0 LOOP
            v_before := v_ticks;
            SELECT array_agg(c.tid), array_agg(c.message_id), count(*) FILTER (WHERE c.kind IN ('c', 'd', 'e'))
            INTO v_tids, v_found, v_rows
            FROM (SELECT m.ctid AS tid, m.message_id, m.kind FROM {schema}.message m
                  WHERE m.stream_id = p_streams[i] AND m.priority = v_priority AND m.due_at <= v_now
                    AND m.lease_token IS NULL AND (v_kinds IS NULL OR m.kind = ANY (v_kinds))
                  ORDER BY m.due_at LIMIT v_left
                  FOR UPDATE SKIP LOCKED) c;
            IF v_tids IS NOT NULL THEN
                v_number := 1048576 + cardinality(v_claimed);
                -- The rows are locked: where they lie, they stay.  They are handed out in their order, and as they come:
                -- a loop over them would take longer than the rest.
                RETURN QUERY
                    UPDATE {schema}.message m
                    SET lease_token = overlay(v_base PLACING to_hex(v_number + t.n) FROM 1 FOR 6)::uuid,
                        worker_id = v_worker_id, started = false
                    FROM unnest(v_tids) WITH ORDINALITY t (tid, n) WHERE m.ctid = t.tid
                    RETURNING m.message_id, m.lease_token, m.stream_id, m.kind::text, m.run_id, m.seq, m.attempt,
                              m.reclaimed, m.actor, m.payload, date_part('epoch', v_now - m.due_at), NULL::bigint, NULL::int[];
                v_claimed := v_claimed || v_found;
                v_ticks := v_ticks + v_rows;
                v_left := v_left - (cardinality(v_found) - v_rows);
            END IF;
            CONTINUE WHEN v_ticks > v_before AND v_ticks < 100;
            EXIT WHEN v_left <= 0;
            v_priorities := v_priorities + 1;
            -- When this priority has something again (not min(): where the statistics are old it would read all the delayed
            -- messages), and which is the next.  Whoever gives nearly every message a priority of its own holds nobody up:
            -- after a hundred only those that have something due, in one pass; the others are looked for in a second.
            SELECT (SELECT m.due_at FROM {schema}.message m
                    WHERE m.stream_id = p_streams[i] AND m.priority = v_priority AND m.due_at > v_now
                    ORDER BY m.due_at LIMIT 1),
                   CASE WHEN v_priorities < 100 THEN
                       (SELECT m.priority FROM {schema}.message m
                        WHERE m.stream_id = p_streams[i] AND m.priority > v_priority ORDER BY m.priority LIMIT 1)
                   ELSE
                       (SELECT m.priority FROM {schema}.message m
                        WHERE m.stream_id = p_streams[i] AND m.priority > v_priority AND m.due_at <= v_now
                          AND m.lease_token IS NULL AND (v_kinds IS NULL OR m.kind = ANY (v_kinds))
                        ORDER BY m.priority, m.due_at LIMIT 1)
                   END
            INTO v_due, v_priority;
            v_next := least(v_next, v_due, CASE WHEN v_priorities >= 100 THEN v_now + interval '1 second' END);
        END LOOP;
    END LOOP;
    -- Whatever the worker says that it has finished, besides what is acknowledged here: what is still leased to it stays
    -- among what it holds, or else nobody would find it when the worker dies.
    v_done := CASE WHEN v_refused = '{}' THEN ARRAY(SELECT unnest(p_done) EXCEPT SELECT unnest(p_acked)) ELSE p_done END;
    IF cardinality(v_done) > 0 THEN
        v_kept := ARRAY(SELECT m.message_id FROM {schema}.message m
                        WHERE m.message_id = ANY (v_done) AND m.worker_id = v_worker_id);
    END IF;
    IF cardinality(v_claimed) > 0 THEN
        UPDATE {schema}.worker w
        SET held = ARRAY(SELECT unnest(w.held) EXCEPT SELECT unnest(p_done)) || v_kept || v_claimed,
            waiting_until = NULL, beat = w.beat + 1, beat_at = v_now
        WHERE w.worker_id = v_worker_id AND w.token = p_worker;
        -- Declared dead, or on another connection, in this very moment: nobody would ever know of these leases.
        IF NOT FOUND THEN
            RAISE EXCEPTION 'this worker is not registered, or was declared dead' USING ERRCODE = 'DD002';
        END IF;
    ELSIF p_wait > 0 THEN
        UPDATE {schema}.worker w
        SET waiting_until = v_now + p_wait * interval '1 millisecond', beat = w.beat + 1, beat_at = v_now,
            held = ARRAY(SELECT unnest(w.held) EXCEPT SELECT unnest(p_done)) || v_kept
        WHERE w.worker_id = v_worker_id
          -- The second look of a worker that goes to sleep writes nothing; but what it finished is never forgotten, or
          -- what it seems to hold would grow for ever.
          AND (w.waiting_until IS NULL OR w.waiting_until < v_now + p_wait * interval '500 microseconds'
               OR cardinality(p_done) > 0);
    END IF;
    message_id := NULL; lease := NULL; payload := NULL;
    stream_id := NULL; kind := NULL; run_id := NULL; seq := NULL; actor := NULL;
    attempt := NULL; reclaimed := NULL;
    next_due := ceil(extract(epoch FROM v_next - v_now) * 1000);
    refused := v_refused;
    RETURN NEXT;
END
$$;

-- The messages are done: delete them.  Answers the positions whose lease is no longer the live one.
CREATE FUNCTION {schema}.ack(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_done bigint[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    WITH done AS (
        DELETE FROM {schema}.message m
        USING unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id
        RETURNING t.n)
    SELECT array_agg(d.n) INTO v_done FROM done d;
    IF cardinality(v_done) = cardinality(p_messages) THEN
        RETURN '{}';
    END IF;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n
                 WHERE v_done IS NULL OR NOT n = ANY (v_done));
END
$$;

-- The messages are to be tried again: the same rows, with a new payload, due after p_delays milliseconds.  Where p_counted
-- is false, nothing was tried, and no attempt is counted.
-- A new payload was made by the worker's encoder: it is no longer SQL's JSON.
-- Answers the positions whose lease is no longer the live one.
CREATE FUNCTION {schema}.reschedule(
    p_worker uuid, p_messages uuid[], p_leases uuid[], p_delays bigint[], p_payloads bytea[], p_failures text[],
    p_counted boolean[] DEFAULT NULL)
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_now timestamptz := clock_timestamp();
    v_done bigint[];
    v_streams int[];
    v_unwanted json;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    WITH done AS (
        UPDATE {schema}.message m
        SET lease_token = NULL, worker_id = NULL, started = false,
            attempt = m.attempt + CASE WHEN t.counted IS FALSE THEN 0 ELSE 1 END,
            -- What was aborted meanwhile does not wait for its end.
            due_at = v_now + t.n * interval '1 microsecond'
                     + CASE WHEN m.abort_at IS NULL THEN least(greatest(t.delay, 0), 315360000000) ELSE 0 END
                       * interval '1 millisecond',
            payload = coalesce(t.payload, m.payload), last_failure = left(t.failure, 1000000), unsettled = NULL,
            kind = CASE WHEN m.kind = 'j' AND t.payload IS NOT NULL THEN 'm' ELSE m.kind END,
            redriven = CASE WHEN t.payload IS NULL THEN m.redriven END
        FROM unnest(p_messages, p_leases, p_delays, p_payloads, p_failures, p_counted)
             WITH ORDINALITY t (message_id, lease, delay, payload, failure, counted, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id
        RETURNING t.n, m.stream_id, m.kind, m.run_id, m.seq,
                  m.attempt - CASE WHEN t.counted IS FALSE THEN 0 ELSE 1 END AS attempt)
    SELECT array_agg(d.n), array_agg(DISTINCT d.stream_id), json_agg(
               json_build_object('run', d.run_id, 'seq', d.seq, 'attempt', d.attempt)) FILTER (WHERE d.kind = 'a')
    INTO v_done, v_streams, v_unwanted FROM done d;
    PERFORM {schema}.drop_unwanted(u.run, u.seq, u.attempt)
    FROM json_to_recordset(v_unwanted) u (run uuid, seq int, attempt int);
    IF v_streams IS NOT NULL THEN
        -- Whoever sleeps learns when they are due.
        PERFORM {schema}.wake(v_streams);
    END IF;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n
                 WHERE v_done IS NULL OR NOT n = ANY (v_done));
END
$$;

-- The worker gives the messages back unprocessed: they are due at once and no attempt is counted.  Activities that nobody
-- wants any more are dropped.
CREATE FUNCTION {schema}.release(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_done bigint[];
    v_streams int[];
    v_unwanted json;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    WITH done AS (
        UPDATE {schema}.message m
        SET lease_token = NULL, worker_id = NULL, started = false
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id
        RETURNING t.n, m.stream_id, m.kind, m.run_id, m.seq, m.attempt)
    SELECT array_agg(d.n), array_agg(DISTINCT d.stream_id), json_agg(
               json_build_object('run', d.run_id, 'seq', d.seq, 'attempt', d.attempt)) FILTER (WHERE d.kind = 'a')
    INTO v_done, v_streams, v_unwanted FROM done d;
    PERFORM {schema}.drop_unwanted(u.run, u.seq, u.attempt)
    FROM json_to_recordset(v_unwanted) u (run uuid, seq int, attempt int);
    IF v_streams IS NOT NULL THEN
        PERFORM {schema}.wake(v_streams);
    END IF;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n
                 WHERE v_done IS NULL OR NOT n = ANY (v_done));
END
$$;

-- The messages were rejected: move them to the dead letters.  What belongs to a run is refused: it would wait for ever.
CREATE FUNCTION {schema}.bury(p_worker uuid, p_messages uuid[], p_leases uuid[], p_payloads bytea[], p_failures text[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_done bigint[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('dead_letter', cardinality(p_messages));
    END IF;
    WITH done AS (
        DELETE FROM {schema}.message m
        USING unnest(p_messages, p_leases, p_payloads, p_failures)
              WITH ORDINALITY t (message_id, lease, payload, failure, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id
          AND m.kind IN ('m', 'j')
        RETURNING t.n, m.*, t.payload AS new_payload, left(t.failure, 1000000) AS failure),
    buried AS (
        INSERT INTO {schema}.dead_letter (
            message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, failure, payload, kind, group_id, unique_key)
        SELECT d.message_id, d.stream_id, d.priority, d.enqueued_at, d.attempt, d.deaths, d.actor,
               CASE WHEN d.abort_at IS NULL THEN 'rejected' ELSE 'aborted' END, d.failure, coalesce(d.new_payload, d.payload),
               CASE WHEN d.new_payload IS NULL THEN d.kind ELSE 'm' END, d.group_id, d.unique_key
        FROM done d)
    SELECT array_agg(d.n) INTO v_done FROM done d;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n
                 WHERE v_done IS NULL OR NOT n = ANY (v_done));
END
$$;

-- The actors of these reclaimed deliveries are about to begin: if the worker dies now, it is counted as a death.
-- Answers the positions whose lease is no longer the live one (their actors must not begin), those that are to be
-- aborted, and those that came back from the dead letters and count their retries anew.
CREATE FUNCTION {schema}.mark_started(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS TABLE (refused int[], aborted int[], anew int[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    RETURN QUERY
        WITH done AS (
            UPDATE {schema}.message m SET started = true
            FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
            WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id
            RETURNING t.n::int, m.abort_at, m.redriven)
        SELECT ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n
                     WHERE n NOT IN (SELECT d.n FROM done d)),
               ARRAY(SELECT d.n FROM done d WHERE d.abort_at IS NOT NULL),
               ARRAY(SELECT d.n FROM done d WHERE d.redriven);
END
$$;
