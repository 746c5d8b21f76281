-- Topics: what runs emit, and the actors that are given it.
--
-- An event waits for a subscriber in topic_event; of each run, the first one that waits is also a message (kind p) on the
-- subscriber's stream, and the end of that message sends the next.  Emitters and workers work on one run's events only
-- under the run's lane.  Neither waits for the other: who finds the lane taken leaves a note (kind n) to look again.

-- Internal: the lane of a run's events.
CREATE FUNCTION {schema}.lane_of(p_run uuid)
RETURNS int
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN get_byte(uuid_send(p_run), 15) & 31;
END
$$;

-- Internal: see to it that the first event of a run that waits for a subscriber is on its way.
-- Answers false, and does nothing, while another transaction is at it.
CREATE FUNCTION {schema}.try_lane(p_subscription int, p_run uuid)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_to {schema}.subscription;
    v_first record;
    v_id uuid;
BEGIN
    PERFORM 1 FROM {schema}.topic_lane l
    WHERE l.subscription_id = p_subscription AND l.lane = {schema}.lane_of(p_run) FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        IF EXISTS (SELECT 1 FROM {schema}.topic_lane l
                   WHERE l.subscription_id = p_subscription AND l.lane = {schema}.lane_of(p_run)) THEN
            RETURN false;
        END IF;
        -- Nobody is subscribed any more.
        DELETE FROM {schema}.topic_event t WHERE t.subscription_id = p_subscription AND t.run_id = p_run;
        RETURN true;
    END IF;
    SELECT s.* INTO v_to FROM {schema}.subscription s WHERE s.subscription_id = p_subscription;
    LOOP
        SELECT t.event_id, t.sent INTO v_first FROM {schema}.topic_event t
        WHERE t.subscription_id = p_subscription AND t.run_id = p_run ORDER BY t.event_id LIMIT 1;
        EXIT WHEN NOT FOUND;
        v_id := overlay(md5('e' || p_subscription || ':' || p_run || ':' || v_first.event_id) PLACING '8' FROM 13)::uuid;
        IF NOT v_first.sent THEN
            UPDATE {schema}.topic_event t SET sent = true
            WHERE t.subscription_id = p_subscription AND t.run_id = p_run AND t.event_id = v_first.event_id;
            INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, seq, actor, payload)
            SELECT v_id, v_to.stream_id, v_to.priority, clock_timestamp(), clock_timestamp(), 'p', p_run, v_first.event_id,
                   v_to.actor,
                   -- Who emitted it, a line, and the value as the run gave it.
                   convert_to(E'event\n' || {schema}.with_fact(json_build_object(
                       'topic', e.name, 'workflow_id', r.workflow_id, 'run_id', p_run, 'event_id', e.event_id,
                       'workflow', r.name, 'queue_name', q.name, 'at', (extract(epoch FROM e.at) * 1000)::bigint),
                       'trace', {schema}.readable(e.attributes) -> 'trace')::text || E'\n', 'UTF8') || coalesce(e.payload, 'null')
            FROM {schema}.event e JOIN {schema}.run r ON r.run_id = e.run_id JOIN {schema}.stream q ON q.stream_id = r.stream_id
            WHERE e.run_id = p_run AND e.event_id = v_first.event_id;
            IF FOUND THEN
                PERFORM {schema}.wake(ARRAY[v_to.stream_id]);
                EXIT;
            END IF;
        ELSIF EXISTS (SELECT 1 FROM {schema}.message m WHERE m.message_id = v_id AND m.stream_id = v_to.stream_id) THEN
            EXIT;
        END IF;
        -- Its history is gone, or its message was ended in another way.
        DELETE FROM {schema}.topic_event t
        WHERE t.subscription_id = p_subscription AND t.run_id = p_run AND t.event_id = v_first.event_id;
    END LOOP;
    RETURN true;
END
$$;

-- Internal: as try_lane; where another transaction is at it, somebody looks again after it.
CREATE FUNCTION {schema}.send_next(p_subscription int, p_run uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_stream int;
BEGIN
    IF NOT {schema}.try_lane(p_subscription, p_run) THEN
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, seq, actor, payload)
        SELECT gen_random_uuid(), s.stream_id, least(-1, s.priority), clock_timestamp(), clock_timestamp(), 'n', p_run,
               p_subscription, s.actor, ''
        FROM {schema}.subscription s WHERE s.subscription_id = p_subscription
        RETURNING stream_id INTO v_stream;
        PERFORM {schema}.wake(ARRAY[v_stream]);
    END IF;
END
$$;

-- Internal: an event of a run's history is given to everybody who is subscribed to its topic.
CREATE FUNCTION {schema}.emit_to_topic(p_run uuid, p_event int, p_topic text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
    v_subscription int;
BEGIN
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('topic_event', 1);
    END IF;
    FOR v_subscription IN
        SELECT s.subscription_id FROM {schema}.subscription s JOIN {schema}.run r ON r.run_id = p_run
        WHERE s.topic = p_topic AND {schema}.may_read(nullif(s.space, 0), r.stream_id, r.principal_id)
          -- One with limits that has fallen as far behind as it may is given no more.
          AND (s.space = 0 OR NOT EXISTS (
            SELECT 1 FROM {schema}.principal p,
                LATERAL (SELECT 1 FROM {schema}.topic_event t WHERE t.subscription_id = s.subscription_id
                         OFFSET p.max_live - 1 LIMIT 1) w
            WHERE p.principal_id = s.space AND p.max_live IS NOT NULL))
    LOOP
        INSERT INTO {schema}.topic_event (subscription_id, run_id, event_id) VALUES (v_subscription, p_run, p_event);
        PERFORM {schema}.send_next(v_subscription, p_run);
    END LOOP;
END
$$;

-- Internal: the message of an event is gone: the run's next one is sent.
CREATE FUNCTION {schema}.end_event(p_stream int, p_actor text, p_run uuid, p_event int)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_subscription int;
BEGIN
    FOR v_subscription IN
        SELECT s.subscription_id FROM {schema}.subscription s
        JOIN {schema}.topic_event t ON t.subscription_id = s.subscription_id AND t.run_id = p_run AND t.event_id = p_event
        WHERE s.stream_id = p_stream AND s.actor = p_actor
    LOOP
        DELETE FROM {schema}.topic_event t
        WHERE t.subscription_id = v_subscription AND t.run_id = p_run AND t.event_id = p_event;
        PERFORM {schema}.send_next(v_subscription, p_run);
    END LOOP;
END
$$;

-- Events are dealt with: their messages are deleted, or (p_failed) go to the dead letters, and each run's next event is
-- sent.  Answers the positions whose lease is no longer the live one.
CREATE FUNCTION {schema}.finish_events(
    p_worker uuid, p_messages uuid[], p_leases uuid[], p_failed boolean[], p_payloads bytea[], p_failures text[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_row record;
    v_done bigint[] := '{}';
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    IF starts_with(session_user, 'dd_') AND true = ANY (p_failed) THEN
        PERFORM {schema}.check_room('dead_letter', cardinality(p_messages));
    END IF;
    FOR v_row IN
        DELETE FROM {schema}.message m
        USING unnest(p_messages, p_leases, p_failed, p_payloads, p_failures)
              WITH ORDINALITY t (message_id, lease, failed, payload, failure, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id AND m.kind = 'p'
        RETURNING t.n, t.failed, left(t.failure, 1000000) AS failure, t.payload AS new_payload, m.*
    LOOP
        v_done := v_done || v_row.n;
        IF v_row.failed THEN
            INSERT INTO {schema}.dead_letter (
                message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, failure, payload, kind)
            VALUES (v_row.message_id, v_row.stream_id, v_row.priority, v_row.enqueued_at, v_row.attempt, v_row.deaths, v_row.actor,
                    CASE WHEN v_row.abort_at IS NULL THEN 'rejected' ELSE 'aborted' END, v_row.failure,
                    coalesce(v_row.new_payload, v_row.payload), 'p');
        END IF;
        PERFORM {schema}.end_event(v_row.stream_id, v_row.actor, v_row.run_id, v_row.seq);
    END LOOP;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n WHERE NOT n = ANY (v_done));
END
$$;

-- Look again, as notes say.  Answers the positions whose lease is no longer the live one.
CREATE FUNCTION {schema}.look_again(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_row record;
    v_done bigint[] := '{}';
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    FOR v_row IN
        SELECT t.n, m.message_id, m.stream_id, m.run_id, m.seq, m.attempt
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                               AND m.worker_id = v_worker.worker_id AND m.kind = 'n'
        FOR UPDATE OF m
    LOOP
        v_done := v_done || v_row.n;
        IF {schema}.try_lane(v_row.seq, v_row.run_id) THEN
            DELETE FROM {schema}.message m WHERE m.message_id = v_row.message_id AND m.stream_id = v_row.stream_id;
        ELSE
            UPDATE {schema}.message m
            SET lease_token = NULL, worker_id = NULL, started = false, attempt = m.attempt + 1,
                due_at = clock_timestamp() + least(2000, 10 * power(2, least(v_row.attempt, 10))) * interval '1 millisecond'
            WHERE m.message_id = v_row.message_id AND m.stream_id = v_row.stream_id;
            PERFORM {schema}.wake(ARRAY[v_row.stream_id]);
        END IF;
    END LOOP;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n WHERE NOT n = ANY (v_done));
END
$$;

-- Subscriptions -------------------------------------------------------------------------------------------------------

-- Subscribe actors to topics: what is emitted from now on, they are given.  Who may consume an actor's stream may subscribe
-- it; it is given what those runs emit that he may look into, an administrator's what any run emits.
-- Answers per position whether that is new; NULL: not permitted.
CREATE FUNCTION {schema}.subscribe(p_topics text[], p_streams int[], p_actors text[], p_priorities int[])
RETURNS boolean[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    v_caller record;
    v_space int;
    v_known record;
    v_new int;
    v_answer boolean[] := '{}';
    i int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    v_space := CASE WHEN v_caller.is_admin THEN 0 ELSE v_caller.principal_id END;
    IF cardinality(p_topics) > 10000 THEN
        RAISE EXCEPTION 'a call has at most 10000 items, not %', cardinality(p_topics) USING ERRCODE = '54000';
    END IF;
    FOR i IN 1 .. cardinality(p_topics) LOOP
        IF cardinality({schema}.permitted(v_caller.principal_id, v_caller.is_admin, ARRAY[p_streams[i]], 'c')) = 0 THEN
            v_answer := v_answer || NULL::boolean;
            CONTINUE;
        END IF;
        SELECT s.subscription_id, s.space INTO v_known FROM {schema}.subscription s
        WHERE s.stream_id = p_streams[i] AND s.actor = p_actors[i] AND s.topic = p_topics[i];
        IF FOUND THEN
            -- As nearly always, when a worker starts: nothing is locked.
            IF v_caller.is_admin AND v_known.space <> 0 THEN
                UPDATE {schema}.subscription s SET space = 0 WHERE s.subscription_id = v_known.subscription_id;
            END IF;
            v_answer := v_answer || false;
            CONTINUE;
        END IF;
        IF starts_with(session_user, 'dd_') THEN
            PERFORM {schema}.check_room('subscription', 1);
        END IF;
        INSERT INTO {schema}.subscription (topic, stream_id, actor, priority, space)
        VALUES (p_topics[i], p_streams[i], p_actors[i], coalesce(p_priorities[i], 0), v_space)
        ON CONFLICT DO NOTHING RETURNING subscription_id INTO v_new;
        IF FOUND THEN
            INSERT INTO {schema}.topic_lane (subscription_id, lane) SELECT v_new, l FROM generate_series(0, 31) l;
        END IF;
        v_answer := v_answer || (v_new IS NOT NULL);
        v_new := NULL;
    END LOOP;
    RETURN v_answer;
END
$$;

-- End a subscription; what its actor has not been given yet is dropped.  Answers whether there was one.
CREATE FUNCTION {schema}.unsubscribe(p_topic text, p_stream int, p_actor text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_caller record;
    v_subscription int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    IF cardinality({schema}.permitted(v_caller.principal_id, v_caller.is_admin, ARRAY[p_stream], 'c')) = 0 THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
    SELECT s.subscription_id INTO v_subscription FROM {schema}.subscription s
    WHERE s.topic = p_topic AND s.stream_id = p_stream AND s.actor = p_actor
      AND (v_caller.is_admin OR s.space = v_caller.principal_id);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- Once the lanes are gone nobody sends any more.  What is on its way and not with a worker is withdrawn.
    DELETE FROM {schema}.topic_lane l WHERE l.subscription_id = v_subscription;
    DELETE FROM {schema}.message m
    USING (SELECT q.message_id, q.stream_id FROM {schema}.topic_event t
           JOIN {schema}.message q ON q.message_id =
               overlay(md5('e' || t.subscription_id || ':' || t.run_id || ':' || t.event_id) PLACING '8' FROM 13)::uuid
           WHERE t.subscription_id = v_subscription AND t.sent AND q.stream_id = p_stream AND q.lease_token IS NULL
           FOR UPDATE OF q SKIP LOCKED) d
    WHERE m.message_id = d.message_id AND m.stream_id = d.stream_id;
    DELETE FROM {schema}.topic_event t WHERE t.subscription_id = v_subscription;
    DELETE FROM {schema}.subscription s WHERE s.subscription_id = v_subscription;
    RETURN true;
END
$$;

-- The subscriptions of the streams that the caller may consume, with how many events each has still to be given.
-- everywhere: it is given what any run emits.
CREATE FUNCTION {schema}.list_subscriptions()
RETURNS TABLE (topic text, actor text, queue_name text, everywhere boolean, created_at timestamptz, waiting bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_caller record;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    RETURN QUERY
        SELECT s.topic, s.actor, q.name, s.space = 0, s.created_at,
               (SELECT count(*) FROM {schema}.topic_event t WHERE t.subscription_id = s.subscription_id)
        FROM {schema}.subscription s JOIN {schema}.stream q ON q.stream_id = s.stream_id
        WHERE v_caller.is_admin OR EXISTS (
            SELECT 1 FROM {schema}.stream_grant g
            WHERE g.principal_id = v_caller.principal_id AND g.stream_id = s.stream_id AND g.consume)
        ORDER BY s.topic, q.name, s.actor;
END
$$;
