-- Abort: a message that waits shall never run, one that runs shall be interrupted.
--
-- abort_at is set once and stays: whatever happens to the row, its next delivery fails at once.  That delivery finds out
-- because it is marked like one from a dead worker, whose start is recorded (mark_started answers that it is aborted);
-- the worker that has the message leased is notified, and asks.

-- Abort the message that has one of these ids (a message's own, or one derived from it).  Without p_running, only while
-- no worker has it.  Answers queued: it waited, and will not run; running: a worker has it (and, with p_running, is told);
-- missing: finished, unknown, a task of a run or a schedule's tick, or of a stream that the caller may not use.
CREATE FUNCTION {schema}.abort_message(p_messages uuid[], p_running boolean)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_caller record;
    v_may int[];
    v_now timestamptz := clock_timestamp();
    v_queued int[];
    v_workers bigint[];
    v_worker bigint;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    IF cardinality(p_messages) > 10 THEN
        RAISE EXCEPTION 'a message has at most 10 ids, not %', cardinality(p_messages) USING ERRCODE = '54000';
    END IF;
    v_may := ARRAY(SELECT g.stream_id FROM {schema}.stream_grant g
                   WHERE g.principal_id = v_caller.principal_id
                     AND (g.produce OR g.consume AND v_caller.kind <> 'activity'));
    WITH marked AS (
        UPDATE {schema}.message m
        SET abort_at = coalesce(m.abort_at, v_now), reclaimed = true,
            due_at = CASE WHEN m.lease_token IS NULL THEN least(m.due_at, v_now) ELSE m.due_at END
        WHERE m.message_id = ANY (p_messages) AND m.kind IN ('m', 'j', 'a', 'p')
          AND (v_caller.is_admin OR m.stream_id = ANY (v_may))
          AND (p_running OR m.lease_token IS NULL)
        RETURNING m.stream_id, m.worker_id)
    SELECT array_agg(k.stream_id) FILTER (WHERE k.worker_id IS NULL), array_agg(DISTINCT k.worker_id) FILTER (WHERE k.worker_id IS NOT NULL)
    INTO v_queued, v_workers FROM marked k;
    FOREACH v_worker IN ARRAY coalesce(v_workers, '{}') LOOP
        -- As everywhere: a full notification queue fails nothing; workers look from time to time.
        IF pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('{namespace}:w' || v_worker, '');
        END IF;
    END LOOP;
    IF v_queued IS NOT NULL THEN
        PERFORM {schema}.wake(v_queued);
        RETURN 'queued';
    END IF;
    IF v_workers IS NOT NULL OR EXISTS (
        SELECT 1 FROM {schema}.message m
        WHERE m.message_id = ANY (p_messages) AND m.kind IN ('m', 'j', 'a', 'p')
          AND (v_caller.is_admin OR m.stream_id = ANY (v_may))) THEN
        RETURN 'running';
    END IF;
    RETURN 'missing';
END
$$;

-- What the worker has been running for longer than a moment, and for how many milliseconds; what it does not hold is left
-- out, or it would hide from others what runs.  Answers the lease tokens of
-- those of its messages that are to be aborted; the same ones again until they are settled.
CREATE FUNCTION {schema}.report_running(p_worker uuid, p_messages uuid[], p_ages bigint[])
RETURNS uuid[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_running uuid[];
    v_since timestamptz[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    IF cardinality(p_messages) > 10000 THEN
        RAISE EXCEPTION 'a call has at most 10000 items, not %', cardinality(p_messages) USING ERRCODE = '54000';
    END IF;
    SELECT coalesce(array_agg(t.message_id ORDER BY t.message_id), '{}'),
           coalesce(array_agg(clock_timestamp() - least(greatest(t.age, 0), 315360000000) * interval '1 millisecond'
                              ORDER BY t.message_id), '{}')
    INTO v_running, v_since
    FROM (SELECT DISTINCT ON (u.message_id) u.message_id, u.age FROM unnest(p_messages, p_ages) u (message_id, age)) t
    WHERE t.age IS NOT NULL AND EXISTS (
        SELECT 1 FROM {schema}.message m WHERE m.message_id = t.message_id AND m.worker_id = v_worker.worker_id);
    -- Written only when something has begun or ended.
    UPDATE {schema}.worker w SET running = v_running, running_since = v_since
    WHERE w.worker_id = v_worker.worker_id AND w.running <> v_running;
    RETURN ARRAY(
        SELECT m.lease_token FROM {schema}.worker w, unnest(w.held) h JOIN {schema}.message m ON m.message_id = h
        WHERE w.worker_id = v_worker.worker_id AND m.worker_id = v_worker.worker_id AND m.abort_at IS NOT NULL);
END
$$;
