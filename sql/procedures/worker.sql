-- Workers: registration, heartbeat, and taking back what a dead worker held.

-- A worker process comes to life.  Answers its token (which every later call must show) and its number.
-- p_reclaim_delay: milliseconds without a heartbeat after which it counts as dead (from a second to a day);
-- p_reclaim_count: after so many deaths under its leases a message is poison.
CREATE FUNCTION {schema}.register_worker(
    p_host text, p_pid int, p_threads int, p_streams int[], p_reclaim_delay bigint, p_reclaim_count int)
RETURNS TABLE (token uuid, worker_id bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    v_caller record;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    IF v_caller.kind = 'producer'
       OR cardinality({schema}.permitted(v_caller.principal_id, v_caller.is_admin, p_streams, 'c')) < cardinality(p_streams) THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('worker', 1);
    END IF;
    RETURN QUERY
        INSERT INTO {schema}.worker AS w (login, principal_id, host, pid, threads, stream_ids, reclaim_delay, reclaim_count)
        VALUES (session_user, v_caller.principal_id, left(p_host, 200), p_pid, least(greatest(p_threads, 0), 10000), p_streams,
                least(greatest(p_reclaim_delay, 1000), 86400000) * interval '1 millisecond', greatest(p_reclaim_count, 1))
        RETURNING w.token, w.worker_id;
END
$$;

-- The worker consumes these streams now: it is woken for them, and watches those who consume them too.
CREATE FUNCTION {schema}.consume_streams(p_worker uuid, p_streams int[])
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    IF cardinality({schema}.permitted(v_worker.principal_id, v_worker.is_admin, p_streams, 'c')) < cardinality(p_streams) THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
    UPDATE {schema}.worker w SET stream_ids = p_streams, rates = '{}' WHERE w.worker_id = v_worker.worker_id;
END
$$;

-- "I live, and these are the messages that I hold."  Any other that is leased to this worker goes back: the answer that
-- handed it out was lost.  Answers the workers that share a stream with this one, and their beats: whoever sees one of
-- them unmoved for its whole reclaim_delay (milliseconds) may reclaim what it held.
-- p_streams, p_rates: how many messages a second it has ended lately on which stream.  That is believed of the streams that
-- it consumes, up to a million; others are ignored.
CREATE FUNCTION {schema}.heartbeat(
    p_worker uuid, p_holding uuid[], p_streams int[] DEFAULT '{}', p_rates double precision[] DEFAULT '{}')
RETURNS TABLE (peer bigint, beat bigint, reclaim_delay bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_worker record;
    v_streams int[];
    v_unnamed uuid[];
    v_left uuid[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    IF cardinality(p_streams) > 10000 THEN
        RAISE EXCEPTION 'a call has at most 10000 items, not %', cardinality(p_streams) USING ERRCODE = '54000';
    END IF;
    p_holding := ARRAY(SELECT d FROM unnest(p_holding) d WHERE d IS NOT NULL);
    SELECT ARRAY(SELECT h FROM unnest(w.held) h WHERE NOT h = ANY (p_holding)) INTO v_unnamed
    FROM {schema}.worker w WHERE w.worker_id = v_worker.worker_id FOR UPDATE;
    IF cardinality(v_unnamed) > 0 THEN
        UPDATE {schema}.message m SET lease_token = NULL, worker_id = NULL, started = false
        FROM (SELECT q.message_id, q.stream_id FROM {schema}.message q
              WHERE q.message_id = ANY (v_unnamed) AND q.worker_id = v_worker.worker_id
              FOR UPDATE SKIP LOCKED) t
        WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
        -- What somebody has locked in this moment is left for the next time.
        v_left := ARRAY(SELECT q.message_id FROM {schema}.message q
                        WHERE q.message_id = ANY (v_unnamed) AND q.worker_id = v_worker.worker_id);
    END IF;
    UPDATE {schema}.worker w
    SET beat = w.beat + 1, beat_at = clock_timestamp(),
        held = ARRAY(SELECT h FROM unnest(w.held) h WHERE h = ANY (p_holding)) || v_left,
        rates = CASE WHEN cardinality(p_streams) > 0 THEN ARRAY(
            SELECT (SELECT nullif(least(greatest(max(g.rate), 0), 1000000), 0) FROM unnest(p_streams, p_rates) g (id, rate)
                    WHERE g.id = s.id)
            FROM unnest(w.stream_ids) WITH ORDINALITY s (id, n) ORDER BY s.n) ELSE '{}' END
    WHERE w.worker_id = v_worker.worker_id RETURNING w.stream_ids INTO v_streams;
    RETURN QUERY
        SELECT w.worker_id, w.beat, (extract(epoch FROM w.reclaim_delay) * 1000)::bigint
        FROM {schema}.worker w
        WHERE w.worker_id <> v_worker.worker_id AND (v_worker.is_admin OR w.stream_ids && v_streams);
END
$$;

-- After an answer was lost: the worker names the messages that it holds; any other that is leased to it goes back.
-- Answers its new token: a claim that is still under way on the lost connection finds the old one gone, and is undone.
CREATE FUNCTION {schema}.resync(p_worker uuid, p_holding uuid[])
RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_unnamed uuid[];
    v_token uuid := gen_random_uuid();
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    p_holding := ARRAY(SELECT d FROM unnest(p_holding) d WHERE d IS NOT NULL);
    SELECT ARRAY(SELECT h FROM unnest(w.held) h WHERE NOT h = ANY (p_holding)) INTO v_unnamed
    FROM {schema}.worker w WHERE w.worker_id = v_worker.worker_id FOR UPDATE;
    UPDATE {schema}.message m SET lease_token = NULL, worker_id = NULL, started = false
    WHERE m.message_id = ANY (v_unnamed) AND m.worker_id = v_worker.worker_id;
    UPDATE {schema}.worker w
    SET token = v_token, held = ARRAY(SELECT h FROM unnest(w.held) h WHERE h = ANY (p_holding)), beat = w.beat + 1,
        beat_at = clock_timestamp()
    WHERE w.worker_id = v_worker.worker_id;
    RETURN v_token;
END
$$;

-- Take back what a dead worker held, and forget the worker.
--
-- The caller has seen its beat unmoved for its whole reclaim_delay; the server checks what it can know by itself: the
-- beat is still the same, and the delay is over also when the time before the server's own start is left out.  Only
-- workers that share a stream take back from each other.
-- Only deliveries of reclaimed messages whose actor had begun count as deaths: what was merely prefetched is no poison.
-- Poison messages are dead-lettered; poison activities fail in their run; tasks of workflows are only slowed down.
CREATE FUNCTION {schema}.reclaim(p_worker uuid, p_peer bigint, p_beat bigint)
RETURNS TABLE (reclaimed int, dead int)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_worker record;
    v_peer record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    SELECT * INTO v_peer FROM {schema}.worker w
    WHERE w.worker_id = p_peer AND w.beat = p_beat
      AND (v_worker.is_admin
           OR w.stream_ids && (SELECT o.stream_ids FROM {schema}.worker o WHERE o.worker_id = v_worker.worker_id))
      AND greatest(w.beat_at, pg_postmaster_start_time()) + w.reclaim_delay < clock_timestamp()
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 0, 0;
        RETURN;
    END IF;
    RETURN QUERY SELECT r.reclaimed, r.dead FROM {schema}.take_back(v_peer.worker_id, v_peer.reclaim_count) r;
END
$$;

-- Internal: free what a worker held and forget it, once nothing is left.  Its row is locked by the caller.
CREATE FUNCTION {schema}.take_back(p_worker_id bigint, p_reclaim_count int)
RETURNS TABLE (reclaimed int, dead int)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_held uuid[];
    v_poison uuid[];
    v_poisoned int[];
    v_runs uuid[];
    v_streams int[];
    v_reclaimed int;
    v_dead int := 0;
    v_events json;
    v_unwanted json;
BEGIN
    SELECT w.held INTO v_held FROM {schema}.worker w WHERE w.worker_id = p_worker_id;
    WITH back AS (
        UPDATE {schema}.message m
        SET lease_token = NULL, worker_id = NULL, started = false, reclaimed = true,
            deaths = m.deaths + m.started::int,
            -- The last one of what is poison is no further attempt.
            attempt = m.attempt + (m.started AND (m.deaths + 1 < p_reclaim_count OR m.kind IN ('s', 't', 'w')))::int,
            due_at = CASE WHEN m.started AND m.kind IN ('s', 't', 'w')
                     THEN clock_timestamp() + least(300, power(2, least(m.deaths, 10))) * interval '1 second'
                     ELSE m.due_at END
        -- What the frozen worker has locked in this moment is left for the next time: nobody waits for it.
        FROM (SELECT q.message_id, q.stream_id, q.attempt FROM {schema}.message q
              WHERE q.message_id = ANY (v_held) AND q.worker_id = p_worker_id
              FOR UPDATE SKIP LOCKED) t
        WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id
        RETURNING m.message_id, m.stream_id, m.kind, m.deaths, m.run_id, m.seq, t.attempt)
    SELECT count(*), array_agg(DISTINCT b.stream_id),
           array_agg(b.message_id) FILTER (WHERE b.deaths >= p_reclaim_count AND b.kind IN ('m', 'j', 'a', 'p')),
           array_agg(b.stream_id) FILTER (WHERE b.deaths >= p_reclaim_count AND b.kind IN ('m', 'j', 'a', 'p')),
           json_agg(json_build_object('run', b.run_id, 'seq', b.seq, 'attempt', b.attempt)) FILTER (WHERE b.kind = 'a')
    INTO v_reclaimed, v_streams, v_poison, v_poisoned, v_unwanted FROM back b;
    PERFORM {schema}.drop_unwanted(u.run, u.seq, u.attempt)
    FROM json_to_recordset(v_unwanted) u (run uuid, seq int, attempt int);
    IF v_poison IS NOT NULL THEN
        WITH gone AS (
            DELETE FROM {schema}.message m USING unnest(v_poison, v_poisoned) t (message_id, stream_id)
            WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id AND m.lease_token IS NULL RETURNING m.*),
        buried AS (
            INSERT INTO {schema}.dead_letter (
                message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, failure, payload, kind, group_id, unique_key)
            SELECT g.message_id, g.stream_id, g.priority, g.enqueued_at, g.attempt, g.deaths, g.actor, 'poison',
                   'the worker died ' || g.deaths || ' times while it ran this message', g.payload,
                   g.kind, g.group_id, g.unique_key
            FROM gone g WHERE g.kind IN ('m', 'j', 'p')),
        told AS (
            INSERT INTO {schema}.inbox (run_id, type, seq, attributes)
            SELECT g.run_id, 'ActivityFailed', g.seq, json_build_object('failure', json_build_object(
                'type', 'WorkerDied', 'retryable', false, 'attempt', g.attempt,
                'message', 'the worker died ' || g.deaths || ' times while it ran this activity'))
            FROM gone g WHERE g.kind = 'a')
        SELECT count(*), array_agg(DISTINCT g.run_id) FILTER (WHERE g.kind = 'a'),
               json_agg(json_build_object('stream', g.stream_id, 'actor', g.actor, 'run', g.run_id, 'event', g.seq))
                   FILTER (WHERE g.kind = 'p')
        INTO v_dead, v_runs, v_events FROM gone g;
        PERFORM {schema}.add_tasks(v_runs);
        PERFORM {schema}.end_event(e.stream, e.actor, e.run, e.event)
        FROM json_to_recordset(v_events) e (stream int, actor text, run uuid, event int);
    END IF;
    v_held := ARRAY(SELECT m.message_id FROM {schema}.message m
                    WHERE m.message_id = ANY (v_held) AND m.worker_id = p_worker_id);
    IF cardinality(v_held) = 0 THEN
        DELETE FROM {schema}.worker w WHERE w.worker_id = p_worker_id;
    ELSE
        UPDATE {schema}.worker w SET held = v_held WHERE w.worker_id = p_worker_id;
    END IF;
    IF v_streams IS NOT NULL THEN
        PERFORM {schema}.wake(v_streams);
    END IF;
    RETURN QUERY SELECT v_reclaimed - v_dead, v_dead;
END
$$;

-- A worker stops: what it still holds goes back at once (no death is counted), and its row is forgotten.
CREATE FUNCTION {schema}.unregister_worker(p_worker uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    PERFORM {schema}.resync(p_worker, '{}');
    DELETE FROM {schema}.worker w WHERE w.worker_id = v_worker.worker_id;
END
$$;
