-- Activities that are ended by whoever has their token: single-use, a bearer's, and kept as a digest.

-- A running activity will be ended by whoever has a token, of which p_token is the digest; the one before, if any, is of
-- no more use.  Answers whether the lease was live.
CREATE FUNCTION {schema}.defer_activity(p_worker uuid, p_message uuid, p_lease uuid, p_token bytea)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_message record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    UPDATE {schema}.message m SET watched = true
    WHERE m.message_id = p_message AND m.lease_token = p_lease AND m.worker_id = v_worker.worker_id AND m.kind = 'a'
    RETURNING m.run_id, m.seq, m.attempt, m.due_at INTO v_message;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO {schema}.activity AS a (run_id, seq, scheduled_at, token, token_attempt)
    VALUES (v_message.run_id, v_message.seq, v_message.due_at, p_token, v_message.attempt)
    ON CONFLICT (run_id, seq) DO UPDATE SET token = excluded.token, token_attempt = excluded.token_attempt;
    RETURN true;
END
$$;

-- The actors have returned, and the activities wait for their tokens: no worker has them any more, and none gets them.
-- Where the run has closed meanwhile nobody waits.
-- Answers the positions whose lease is no longer the live one (the token may have been used already).
CREATE FUNCTION {schema}.park_activities(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_live uuid[];
    v_row record;
    v_done bigint[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    -- What closes a run leaves to its worker what is leased, and meets nobody who is about to give it back.
    WITH live AS (
        SELECT r.run_id FROM {schema}.run r
        WHERE r.status = 'running' AND r.run_id IN (
            SELECT m.run_id FROM unnest(p_messages, p_leases) t (message_id, lease)
            JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease)
        ORDER BY r.run_id FOR KEY SHARE OF r)
    SELECT array_agg(l.run_id) INTO v_live FROM live l;
    FOR v_row IN
        UPDATE {schema}.message m
        SET lease_token = NULL, worker_id = NULL, started = false, due_at = clock_timestamp() + interval '3650 days'
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id AND m.kind = 'a'
        RETURNING t.n, m.message_id, m.stream_id, m.run_id, m.seq
    LOOP
        v_done := v_done || v_row.n;
        IF (v_row.run_id = ANY (v_live)) IS NOT TRUE THEN
            DELETE FROM {schema}.message m WHERE m.message_id = v_row.message_id AND m.stream_id = v_row.stream_id;
            PERFORM {schema}.forget_activity(v_row.run_id, v_row.seq);
        END IF;
    END LOOP;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n
                 WHERE v_done IS NULL OR NOT n = ANY (v_done));
END
$$;

-- Which attempt of an activity a token is for, and the policy by which the activity is tried again, if it has one.
-- No row: nobody waits for that token.
CREATE FUNCTION {schema}.attempt_of_token(p_run uuid, p_seq int, p_token bytea)
RETURNS TABLE (attempt int, policy text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    PERFORM {schema}.caller();
    RETURN QUERY
        SELECT m.attempt,
               (SELECT ({schema}.readable(e.attributes) #> '{options,durable_retry}')::text FROM {schema}.event e
                WHERE e.run_id = p_run AND e.type = 'ActivityScheduled' AND e.seq = p_seq LIMIT 1)
        FROM {schema}.message m JOIN {schema}.activity a ON a.run_id = m.run_id AND a.seq = m.seq
        WHERE m.message_id = (SELECT d.message_id FROM {schema}.activity_ids(p_run, p_seq) d)
          AND m.run_id = p_run AND m.kind = 'a' AND a.token = p_token AND a.token_attempt = m.attempt;
END
$$;

-- Whoever has the token of an activity says how it ended: p_types ActivityCompleted or ActivityFailed.  The token is the
-- only right that is needed, beside being known here.  An attempt that failed is followed by another in p_delays
-- milliseconds, and p_failures is what it shows until then; NULL: by none, as where the activity was cancelled.
-- Answers per position: ok; or missing (the token is unknown, was used, or the activity has ended otherwise).
CREATE FUNCTION {schema}.finish_activities(
    p_sender uuid, p_batch bigint, p_runs uuid[], p_seqs int[], p_tokens bytea[], p_types text[], p_payloads bytea[],
    p_attributes text[], p_delays bigint[], p_failures text[])
RETURNS text[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_message record;
    v_told uuid[] := '{}';
    v_answer text[] := '{}';
    i int;
BEGIN
    PERFORM {schema}.caller();
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_runs));
    FOR i IN 1 .. cardinality(p_runs) LOOP
        SELECT m.message_id, m.stream_id, m.actor, m.attempt, m.worker_id INTO v_message
        FROM {schema}.message m JOIN {schema}.activity a ON a.run_id = m.run_id AND a.seq = m.seq
        WHERE m.message_id = (SELECT d.message_id FROM {schema}.activity_ids(p_runs[i], p_seqs[i]) d)
          AND m.run_id = p_runs[i] AND m.kind = 'a' AND a.token = p_tokens[i] AND a.token_attempt = m.attempt
        FOR UPDATE OF m;
        IF NOT FOUND OR (p_types[i] IN ('ActivityCompleted', 'ActivityFailed')) IS NOT TRUE THEN
            v_answer := v_answer || 'missing'::text;
            CONTINUE;
        END IF;
        IF p_types[i] = 'ActivityFailed' AND p_delays[i] IS NOT NULL AND NOT {schema}.is_cancelled(p_runs[i], p_seqs[i]) THEN
            -- The token goes with the attempt.
            UPDATE {schema}.message m
            SET lease_token = NULL, worker_id = NULL, started = false, attempt = m.attempt + 1,
                last_failure = left(p_failures[i], 1000000),
                due_at = clock_timestamp() + least(greatest(p_delays[i], 0), 315360000000) * interval '1 millisecond'
            WHERE m.message_id = v_message.message_id AND m.stream_id = v_message.stream_id;
            PERFORM {schema}.wake(ARRAY[v_message.stream_id], p_sender IS NULL);
            v_answer := v_answer || 'ok'::text;
            CONTINUE;
        END IF;
        DELETE FROM {schema}.message m WHERE m.message_id = v_message.message_id AND m.stream_id = v_message.stream_id;
        PERFORM {schema}.forget_activity(p_runs[i], p_seqs[i]);
        INSERT INTO {schema}.inbox (run_id, type, seq, name, payload, attributes)
        SELECT r.run_id, p_types[i], p_seqs[i], v_message.actor, p_payloads[i],
               CASE WHEN p_types[i] = 'ActivityFailed' THEN {schema}.failure_attributes(p_attributes[i]) END
        FROM {schema}.run r WHERE r.run_id = p_runs[i] AND r.status = 'running';
        v_told := v_told || p_runs[i];
        v_answer := v_answer || 'ok'::text;
    END LOOP;
    PERFORM {schema}.add_tasks(v_told, p_sender IS NULL);
    RETURN v_answer;
END
$$;

-- Whoever has the token of an activity says that it goes on.  Answers the attempt; cancelled; missing, as above.
CREATE FUNCTION {schema}.beat_by_token(p_run uuid, p_seq int, p_token bytea, p_details bytea)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    PERFORM {schema}.caller();
    PERFORM 1 FROM {schema}.message m
    WHERE m.message_id = (SELECT d.message_id FROM {schema}.activity_ids(p_run, p_seq) d) AND m.run_id = p_run AND m.kind = 'a'
      AND EXISTS (SELECT 1 FROM {schema}.activity a WHERE a.run_id = p_run AND a.seq = p_seq AND a.token = p_token
                                                      AND a.token_attempt = m.attempt)
    FOR NO KEY UPDATE OF m;
    IF FOUND THEN
        UPDATE {schema}.activity a SET beat_at = clock_timestamp(), details = coalesce(p_details, a.details)
        WHERE a.run_id = p_run AND a.seq = p_seq;
        RETURN CASE WHEN {schema}.is_cancelled(p_run, p_seq) THEN 'cancelled' ELSE 'ok' END;
    END IF;
    -- One that was withdrawn keeps its row until the run closes.
    RETURN CASE WHEN EXISTS (SELECT 1 FROM {schema}.activity a JOIN {schema}.activity_cancel c ON c.run_id = a.run_id AND c.seq = a.seq
                             WHERE a.run_id = p_run AND a.seq = p_seq AND a.token = p_token)
           THEN 'cancelled' ELSE 'missing' END;
END
$$;
