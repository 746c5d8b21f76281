-- Queries: asked from outside, answered by a worker that has the run's state in memory, or brings it back from its
-- history.  Nothing of it enters the history.

-- Internal: the run that goes on for one, or did so last; that run itself, where none does.
CREATE FUNCTION {schema}.last_run(p_run {schema}.run)
RETURNS {schema}.run
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_last {schema}.run;
BEGIN
    IF p_run.status = 'running' OR p_run.next_run_id IS NULL THEN
        RETURN p_run;
    END IF;
    SELECT r.* INTO v_last FROM {schema}.run r
    WHERE r.workflow_id = p_run.workflow_id AND r.stream_id = p_run.stream_id AND r.next_run_id IS NULL
      AND r.first_run_id = coalesce(p_run.first_run_id, p_run.run_id)
    ORDER BY r.started_at DESC LIMIT 1;
    RETURN v_last;
END
$$;

-- Ask a run, or the last that went on for it.  Answers the query's id, NULL where the run is missing or foreign (known = false); and whether any live
-- worker consumes the run's stream.  p_heard: where none does, nothing is asked (the id is NULL).
-- The channel is notified of the answer, which is kept for p_wait milliseconds.
CREATE FUNCTION {schema}.ask_run(
    p_run uuid, p_workflow_id text, p_name text, p_input bytea, p_channel uuid, p_wait int, p_heard boolean,
    OUT query_id uuid, OUT known boolean, OUT heard boolean, OUT queue_name text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    v_run {schema}.run := {schema}.last_run({schema}.find_run(p_run, p_workflow_id, 'e'));
    v_now timestamptz := clock_timestamp();
BEGIN
    known := v_run.run_id IS NOT NULL;
    IF NOT known THEN
        RETURN;
    END IF;
    SELECT s.name INTO ask_run.queue_name FROM {schema}.stream s WHERE s.stream_id = v_run.stream_id;
    heard := EXISTS (SELECT 1 FROM {schema}.worker w
                     WHERE v_run.stream_id = ANY (w.stream_ids) AND w.beat_at + w.reclaim_delay > v_now);
    IF p_heard AND NOT heard THEN
        RETURN;
    END IF;
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('run_query', 1);
        PERFORM {schema}.check_room('message', 1);
    END IF;
    query_id := gen_random_uuid();
    INSERT INTO {schema}.run_query (query_id, run_id, stream_id, name, input, channel, until)
    VALUES (ask_run.query_id, v_run.run_id, v_run.stream_id, p_name, p_input, p_channel,
            v_now + least(greatest(p_wait, 0), 3600000) * interval '1 millisecond');
    INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, actor, payload)
    VALUES (ask_run.query_id, v_run.stream_id, -1, v_now, v_now, 'q', v_run.run_id, v_run.name, '');
    PERFORM {schema}.wake(ARRAY[v_run.stream_id]);
END
$$;

-- The answers that are there; each is given once, to whoever knows the query's id.
CREATE FUNCTION {schema}.take_answers(p_queries uuid[])
RETURNS TABLE (query_id uuid, answer bytea, failure text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    PERFORM {schema}.caller();
    RETURN QUERY
        DELETE FROM {schema}.run_query q
        WHERE q.query_id = ANY (ARRAY(
            SELECT o.query_id FROM {schema}.run_query o
            WHERE o.query_id = ANY (p_queries) AND o.answered FOR UPDATE SKIP LOCKED))
        RETURNING q.query_id, q.answer, q.failure::text;
END
$$;

-- Nobody waits for this answer any more.
CREATE FUNCTION {schema}.withdraw_query(p_query uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_stream int;
BEGIN
    PERFORM {schema}.caller();
    DELETE FROM {schema}.run_query q WHERE q.query_id = p_query RETURNING q.stream_id INTO v_stream;
    DELETE FROM {schema}.message m
    USING (SELECT o.message_id, o.stream_id FROM {schema}.message o
           WHERE o.message_id = p_query AND o.stream_id = v_stream AND o.kind = 'q' AND o.lease_token IS NULL
           FOR UPDATE SKIP LOCKED) t
    WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
END
$$;

-- What a leased query asks, whether something waits in its run's inbox, and whether the run has begun; no row where nobody
-- waits for the answer.
CREATE FUNCTION {schema}.query_of_lease(p_worker uuid, p_message uuid, p_lease uuid)
RETURNS TABLE (name text, input bytea, pending boolean, begun boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    PERFORM {schema}.authenticate(p_worker);
    RETURN QUERY
        SELECT q.name, q.input, EXISTS (SELECT 1 FROM {schema}.inbox i WHERE i.run_id = r.run_id),
               -- The first task's message has the run's id.
               NOT EXISTS (SELECT 1 FROM {schema}.message m WHERE m.message_id = r.run_id AND m.kind = 's')
        FROM {schema}.run_of_lease(p_worker, p_message, p_lease) r
        JOIN {schema}.run_query q ON q.query_id = p_message AND q.run_id = r.run_id
        WHERE q.until > clock_timestamp();
END
$$;

-- Answer queries, and be done with their messages.  Answers the positions whose lease is no longer the live one.
CREATE FUNCTION {schema}.answer_queries(
    p_worker uuid, p_messages uuid[], p_leases uuid[], p_answers bytea[], p_failures text[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_row record;
    v_done int[] := '{}';
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    FOR v_row IN
        DELETE FROM {schema}.message m
        USING unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id AND m.kind = 'q'
        RETURNING t.n, m.message_id, m.stream_id
    LOOP
        v_done := v_done || v_row.n::int;
    END LOOP;
    FOR v_row IN
        UPDATE {schema}.run_query q
        SET answered = true, answer = t.answer, failure = t.failure::json
        FROM unnest(p_messages, p_answers, p_failures) WITH ORDINALITY t (message_id, answer, failure, n),
             LATERAL (SELECT o.query_id FROM {schema}.run_query o
                      WHERE o.query_id = t.message_id AND NOT o.answered FOR UPDATE SKIP LOCKED) k
        WHERE t.n = ANY (v_done) AND q.query_id = k.query_id
        RETURNING q.channel
    LOOP
        IF pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('durable:c' || v_row.channel, '');
        END IF;
    END LOOP;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n WHERE NOT n = ANY (v_done));
END
$$;
