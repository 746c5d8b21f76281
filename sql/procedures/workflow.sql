-- Workflow tasks: what a worker does to runs, under the leases that it holds.
--
-- What a call may touch is derived from the lease: the run is the leased message's run, never an argument.

-- The run that a leased task (or timer, or activity) belongs to, for a worker that has to load it.  begun: its first task is
-- done (or gone).
CREATE FUNCTION {schema}.run_of_lease(p_worker uuid, p_message uuid, p_lease uuid)
RETURNS TABLE (
    run_id uuid, workflow_id text, name text, queue_name text, status text, started_at bigint, last_event int,
    parent_run_id uuid, parent_workflow_id text, begun boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    RETURN QUERY
        SELECT r.run_id, r.workflow_id, r.name, s.name, r.status, (extract(epoch FROM r.started_at) * 1000)::bigint,
               r.last_event, r.parent_run_id, p.workflow_id,
               -- The first task's message has the run's id.
               NOT EXISTS (SELECT 1 FROM {schema}.message f
                           WHERE f.message_id = r.run_id AND f.stream_id = r.stream_id AND f.kind = 's')
        FROM {schema}.message m
        JOIN {schema}.run r ON r.run_id = m.run_id
        JOIN {schema}.stream s ON s.stream_id = r.stream_id
        LEFT JOIN {schema}.run p ON p.run_id = r.parent_run_id
        WHERE m.message_id = p_message AND m.lease_token = p_lease AND m.worker_id = v_worker.worker_id
          AND r.stream_id = ANY ({schema}.permitted(v_worker.principal_id, v_worker.is_admin, ARRAY[r.stream_id], 'r'));
END
$$;

-- The events of the leased message's run after p_after, and then (event_id NULL) what waits in its inbox.
CREATE FUNCTION {schema}.history_of_lease(p_worker uuid, p_message uuid, p_lease uuid, p_after int)
RETURNS TABLE (
    event_id int, inbox_id bigint, type text, at bigint, seq int, name text, payload bytea, attributes text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run uuid;
BEGIN
    SELECT r.run_id INTO v_run FROM {schema}.run_of_lease(p_worker, p_message, p_lease) r;
    RETURN QUERY
        SELECT e.event_id, NULL::bigint, e.type, (extract(epoch FROM e.at) * 1000)::bigint, e.seq, e.name, e.payload, e.attributes::text
        FROM {schema}.event e WHERE e.run_id = v_run AND e.event_id > p_after ORDER BY e.event_id;
    RETURN QUERY
        SELECT NULL::int, i.inbox_id, i.type, (extract(epoch FROM i.at) * 1000)::bigint, i.seq, i.name, i.payload, i.attributes::text
        FROM {schema}.inbox i WHERE i.run_id = v_run ORDER BY i.inbox_id;
END
$$;

-- Internal: the attributes with which an activity's worker says that it failed: an object that whoever reads the run's
-- history can read.  What is none, or is nested too deeply for the parsers of other languages, is replaced: a history with
-- it could never be loaded again.
CREATE FUNCTION {schema}.failure_attributes(p_attributes text)
RETURNS json
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_attributes json := p_attributes;
    v_depth int := 0;
BEGIN
    IF p_attributes IS NULL THEN
        RETURN NULL;
    END IF;
    -- As nearly always, there are not as many brackets in it.
    IF length(p_attributes) - length(translate(p_attributes, '[{', '')) > 100 THEN
        SELECT max(b.depth) INTO v_depth
        FROM (SELECT sum(CASE WHEN t.c IN ('[', '{') THEN 1 ELSE -1 END) OVER (ORDER BY t.n) AS depth
              FROM regexp_split_to_table(regexp_replace(
                  regexp_replace(p_attributes, E'"(?:[^"\\\\]|\\\\.)*"', '', 'g'), '[^][{}]', '', 'g'), '') WITH ORDINALITY t (c, n)
              WHERE t.c <> '') b;
    END IF;
    IF json_typeof(v_attributes) <> 'object' OR v_depth > 100 THEN
        RETURN json_build_object('failure', json_build_object(
            'type', 'Unreadable', 'message', 'its worker has not said how it failed', 'retryable', false));
    END IF;
    RETURN v_attributes;
END
$$;

-- Activities ended, and nothing but the outcome is to be recorded: it goes into the run's inbox, a task follows, and
-- the activity's message is gone.  p_types: ActivityCompleted or ActivityFailed.
-- Answers the positions whose lease is no longer the live one: their outcome is not recorded.
CREATE FUNCTION {schema}.complete_activities(
    p_worker uuid, p_messages uuid[], p_leases uuid[], p_types text[], p_payloads bytea[], p_attributes text[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_done bigint[];
    v_runs uuid[];
    v_watched uuid[];
    v_watched_seq int[];
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    WITH done AS (
        DELETE FROM {schema}.message m
        USING unnest(p_messages, p_leases, p_types, p_payloads, p_attributes)
              WITH ORDINALITY t (message_id, lease, type, payload, attributes, n)
        WHERE m.message_id = t.message_id AND m.lease_token = t.lease AND m.worker_id = v_worker.worker_id
          AND m.kind = 'a' AND t.type IN ('ActivityCompleted', 'ActivityFailed')
        RETURNING t.n, m.run_id, m.seq, m.actor, m.watched, t.type, t.payload, t.attributes),
    told AS (
        INSERT INTO {schema}.inbox (run_id, type, seq, name, payload, attributes)
        SELECT d.run_id, d.type, d.seq, d.actor, d.payload, {schema}.failure_attributes(d.attributes)
        FROM done d JOIN {schema}.run r ON r.run_id = d.run_id AND r.status = 'running'
        RETURNING run_id)
    SELECT (SELECT array_agg(d.n) FROM done d), (SELECT array_agg(DISTINCT t.run_id) FROM told t),
           (SELECT array_agg(d.run_id) FROM done d WHERE d.watched), (SELECT array_agg(d.seq) FROM done d WHERE d.watched)
    INTO v_done, v_runs, v_watched, v_watched_seq;
    FOR i IN 1 .. coalesce(cardinality(v_watched), 0) LOOP
        PERFORM {schema}.forget_activity(v_watched[i], v_watched_seq[i]);
    END LOOP;
    IF v_runs IS NOT NULL THEN
        PERFORM {schema}.add_tasks(v_runs);
    END IF;
    RETURN ARRAY(SELECT n FROM generate_series(1, cardinality(p_messages)) n
                 WHERE v_done IS NULL OR NOT n = ANY (v_done));
END
$$;

-- A workflow task could not be done (nondeterminism, a bug in a worker): the run stays open, the task comes again after
-- p_delay milliseconds, and the failure is shown.  Answers whether the lease was live.
CREATE FUNCTION {schema}.fail_task(p_worker uuid, p_message uuid, p_lease uuid, p_failure text, p_delay bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_worker record;
    v_run uuid;
    v_stream int;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    UPDATE {schema}.message m
    SET lease_token = NULL, worker_id = NULL, started = false, attempt = m.attempt + 1, last_failure = left(p_failure, 1000000),
        due_at = clock_timestamp() + least(greatest(p_delay, 0), 315360000000) * interval '1 millisecond'
    WHERE m.message_id = p_message AND m.lease_token = p_lease AND m.worker_id = v_worker.worker_id
      AND m.kind IN ('s', 't', 'w')
    RETURNING m.run_id, m.stream_id INTO v_run, v_stream;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE {schema}.run r SET task_failure = left(p_failure, 1000000) WHERE r.run_id = v_run AND r.status = 'running';
    -- Whoever sleeps learns when it is due.
    PERFORM {schema}.wake(ARRAY[v_stream]);
    RETURN true;
END
$$;

-- One step of many runs: for each, finish the delivery that led to the step, record its events, hand out its commands.
--
-- Step i finishes the delivery (p_messages[i], p_leases[i]), a task, a timer or an activity of the run that goes on, and
-- may do so only if the run's last event is still p_expected[i]; p_after[i] >= 1 names the earlier step of the same run
-- in this call that it builds upon.  p_close[i] is the status in which the step ends the run, or NULL.
-- Events are in the run's order and already numbered.  The other arrays name their step by position:
--   p_inbox:  what the step took out of the run's inbox
--   p_send:   activities ('a', with limits 'l') and timers ('w'), by the number of their command; delay in milliseconds;
--             an eager one is leased to this worker at once
--   p_drop:   timers that are withdrawn
--   p_child:  child workflows to start;  p_cancel: children to cancel
-- A step that would close the run over signals or updates that its code has not seen is refused, and so is one that takes
-- back an escalation that is no longer open, or takes from the inbox what is no longer there.
-- An event numbered 0 is not recorded, only carried out.
--
-- Answers (step, status, NULL, NULL): ok, stale (the delivery's lease is gone) or refused (the run went on elsewhere,
-- is being closed, or has unread signals: load it again); and (step, 'eager', seq, lease) for what was handed out.
CREATE FUNCTION {schema}.advance(
    p_worker uuid,
    p_messages uuid[], p_leases uuid[], p_expected int[], p_after int[], p_last int[], p_close text[],
    p_event_step int[], p_event_id int[], p_event_type text[], p_event_at bigint[], p_event_seq int[], p_event_name text[],
    p_event_payload bytea[], p_event_attributes text[],
    p_inbox_step int[], p_inbox_id bigint[],
    p_send_step int[], p_send_kind text[], p_send_stream int[], p_send_seq int[], p_send_actor text[],
    p_send_priority int[], p_send_delay bigint[], p_send_payload bytea[], p_send_eager boolean[],
    p_drop_step int[], p_drop_seq int[],
    p_child_step int[], p_child_seq int[], p_child_stream int[], p_child_name text[], p_child_workflow_id text[],
    p_child_input bytea[], p_child_options text[],
    p_cancel_step int[], p_cancel_seq int[])
RETURNS TABLE (step int, status text, seq int, lease uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_worker record;
    v_now timestamptz := clock_timestamp();
    v_steps int := cardinality(p_messages);
    v_run uuid[] := array_fill(NULL::uuid, ARRAY[cardinality(p_messages)]);
    v_live boolean[] := array_fill(false, ARRAY[cardinality(p_messages)]);
    v_ok boolean[] := array_fill(false, ARRAY[cardinality(p_messages)]);
    v_may int[];
    v_mine int[];
    v_near int[];
    v_row record;
    v_told uuid[] := '{}';
    v_eager uuid[];
    v_watched uuid[] := '{}';
    v_watched_seq int[] := '{}';
    v_woken int[] := p_child_stream;
    v_taking_back constant text[] := ARRAY['EscalationTimedOut', 'EscalationWithdrawn'];
    -- Events that bring something about: see carry_out().
    v_eventful constant text[] := ARRAY[
        'SearchUpserted', 'EntityChanged', 'TopicEmitted', 'OutputWritten', 'ChildStartAwaited', 'ActivityCancelled',
        'ActivityCancelRequested', 'UpdateAccepted', 'UpdateCompleted', 'UpdateRejected',
        'EscalationOpened', 'EscalationTimedOut', 'EscalationWithdrawn'];
    i int;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);

    -- Steps are looked at by their number, and stored by their place: these must be the same.
    IF array_lower(p_messages, 1) <> 1 OR array_lower(p_leases, 1) <> 1 OR array_lower(p_expected, 1) <> 1
       OR array_lower(p_after, 1) <> 1 OR array_lower(p_last, 1) <> 1 OR array_lower(p_close, 1) <> 1
       OR array_ndims(p_messages) > 1 OR array_ndims(p_leases) > 1 OR array_ndims(p_expected) > 1
       OR array_ndims(p_after) > 1 OR array_ndims(p_last) > 1 OR array_ndims(p_close) > 1 THEN
        RAISE EXCEPTION 'arrays of steps begin with 1' USING ERRCODE = '22023';
    END IF;
    IF NOT v_worker.is_admin THEN
        v_mine := {schema}.permitted(v_worker.principal_id, false, ARRAY(
            SELECT g.stream_id FROM {schema}.stream_grant g WHERE g.principal_id = v_worker.principal_id), 'r');
    END IF;

    -- The deliveries that are live, and the last events of their runs.  A run that another transaction is stepping is
    -- skipped, not waited for.  One that is none of the caller's is not even locked: its activity may be with him.
    FOR v_row IN
        SELECT t.n, m.run_id, r.last_event, r.stream_id, r.status, m.watched, m.seq
        FROM unnest(p_messages, p_leases) WITH ORDINALITY t (message_id, lease, n)
        JOIN {schema}.message m ON m.message_id = t.message_id AND m.lease_token = t.lease
                               AND m.worker_id = v_worker.worker_id AND m.kind IN ('a', 's', 't', 'w')
        JOIN {schema}.run r ON r.run_id = m.run_id AND (v_mine IS NULL OR r.stream_id = ANY (v_mine))
        ORDER BY t.n
        FOR NO KEY UPDATE OF r SKIP LOCKED
    LOOP
        i := v_row.n;
        v_run[i] := v_row.run_id;
        v_live[i] := true;
        IF v_row.watched THEN
            v_watched[i] := v_row.run_id;
            v_watched_seq[i] := v_row.seq;
        END IF;
        v_ok[i] := (v_row.status = 'running' AND CASE
            WHEN p_after[i] >= 1 THEN v_ok[p_after[i]] AND v_run[p_after[i]] = v_row.run_id
                AND p_last[p_after[i]] = p_expected[i] AND p_close[p_after[i]] IS NULL
            ELSE v_row.last_event = p_expected[i] END) IS TRUE;
        IF v_ok[i] AND p_event_type && v_taking_back THEN
            -- What somebody has resolved, or is resolving, did not time out: the run is to hear of it first.
            v_ok[i] := NOT EXISTS (
                SELECT 1 FROM unnest(p_event_step, p_event_type, p_event_seq) e (s, type, seq)
                WHERE e.s = i AND e.type = ANY (v_taking_back) AND NOT {schema}.may_take_back(v_row.run_id, e.seq));
        END IF;
        IF v_ok[i] AND p_close[i] IS NOT NULL THEN
            -- Senders hold a key-share lock on the run until they commit: while one is at it the run does not close, and
            -- no run closes while one is at a child that would end with it.
            -- What continues as new hands over what it has not read.
            v_ok[i] := p_close[i] <> 'running' AND {schema}.lock_tree(v_row.run_id) AND NOT EXISTS (
                SELECT 1 FROM {schema}.inbox b
                WHERE b.run_id = v_row.run_id AND b.type IN ('SignalReceived', 'UpdateRequested')
                  AND p_close[i] <> 'continued_as_new'
                  -- Hashed: there may be thousands of either.
                  AND b.inbox_id NOT IN (SELECT u.id FROM unnest(p_inbox_id) u (id) WHERE u.id IS NOT NULL));
        END IF;
    END LOOP;
    -- A rejected update leaves no event, by which one could tell that another step has taken it from the inbox meanwhile.
    IF cardinality(p_inbox_id) > 0 THEN
        FOR i IN
            SELECT DISTINCT u.s FROM unnest(p_inbox_step, p_inbox_id) u (s, id)
            WHERE v_ok[u.s] AND NOT EXISTS (SELECT 1 FROM {schema}.inbox b WHERE b.run_id = v_run[u.s] AND b.inbox_id = u.id)
        LOOP
            v_ok[i] := false;
        END LOOP;
        FOR i IN 1 .. v_steps LOOP
            v_ok[i] := v_ok[i] AND (p_after[i] >= 1 AND NOT v_ok[p_after[i]]) IS NOT TRUE;
        END LOOP;
    END IF;

    -- A command to a stream that the caller has no right to is the workflow's failure to see, not the worker's.
    IF cardinality(p_send_stream) > 0 OR cardinality(p_child_stream) > 0 THEN
        v_may := {schema}.permitted(v_worker.principal_id, v_worker.is_admin, p_send_stream || p_child_stream, 'e');
        -- Each where it is used: arrays of different lengths or bounds must not pair a step with another's stream.
        IF EXISTS (SELECT 1 FROM unnest(p_send_step, p_send_stream) u (s, id)
                   WHERE v_ok[u.s] AND (u.id = ANY (v_may)) IS NOT TRUE) THEN
            RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
        END IF;
        FOR i IN 1 .. cardinality(p_child_seq) LOOP
            IF v_ok[p_child_step[i]] AND (p_child_stream[i] = ANY (v_may)) IS NOT TRUE THEN
                RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
            END IF;
        END LOOP;
    END IF;
    -- What is leased at once must be what a claim would hand out.
    IF true = ANY (p_send_eager) THEN
        v_near := {schema}.permitted(v_worker.principal_id, v_worker.is_admin, p_send_stream, 'a');
        v_near := ARRAY(SELECT s.stream_id FROM {schema}.stream s WHERE s.stream_id = ANY (v_near) AND NOT s.paused);
    END IF;

    FOR i IN 1 .. v_steps LOOP
        step := i;
        status := CASE WHEN v_ok[i] THEN 'ok' ELSE 'refused' END;
        IF NOT v_ok[i] AND NOT v_live[i] THEN
            PERFORM 1 FROM {schema}.message m
            WHERE m.message_id = p_messages[i] AND m.lease_token = p_leases[i] AND m.worker_id = v_worker.worker_id;
            status := CASE WHEN FOUND THEN 'refused' ELSE 'stale' END;
        END IF;
        RETURN NEXT;
    END LOOP;
    IF NOT true = ANY (v_ok) THEN
        RETURN;
    END IF;

    UPDATE {schema}.run r
    SET last_event = t.last, task_failure = NULL, status = coalesce(t.close, 'running'),
        closed_at = CASE WHEN t.close IS NOT NULL THEN v_now END
    FROM (SELECT DISTINCT ON (u.run) u.run, u.last, u.close
          FROM unnest(v_run, p_last, p_close, v_ok) u (run, last, close, ok) WHERE u.ok ORDER BY u.run, u.last DESC) t
    WHERE r.run_id = t.run;
    DELETE FROM {schema}.message m
    USING unnest(p_messages, p_leases, v_ok) t (message_id, lease, ok)
    WHERE t.ok AND m.message_id = t.message_id AND m.lease_token = t.lease;
    GET DIAGNOSTICS i = ROW_COUNT;
    IF i < cardinality(array_remove(v_ok, false)) THEN
        -- The worker was declared dead between the look above and here: nothing is recorded, the caller finds out.
        RAISE EXCEPTION 'a lease was lost in this very moment' USING ERRCODE = '40001';
    END IF;
    FOR i IN 1 .. coalesce(array_upper(v_watched, 1), 0) LOOP
        IF v_ok[i] AND v_watched[i] IS NOT NULL THEN
            PERFORM {schema}.forget_activity(v_watched[i], v_watched_seq[i]);
        END IF;
    END LOOP;
    INSERT INTO {schema}.event (run_id, event_id, type, at, seq, name, payload, attributes)
    SELECT v_run[e.s], e.id, left(e.type, 200), to_timestamp(e.at / 1000.0), e.seq, e.name, e.payload, e.attributes::json
    FROM unnest(p_event_step, p_event_id, p_event_type, p_event_at, p_event_seq, p_event_name, p_event_payload, p_event_attributes)
         e (s, id, type, at, seq, name, payload, attributes)
    WHERE v_ok[e.s] AND e.id > 0;

    IF cardinality(p_inbox_id) > 0 THEN
        DELETE FROM {schema}.inbox b USING unnest(p_inbox_step, p_inbox_id) t (s, id)
        WHERE v_ok[t.s] AND b.run_id = v_run[t.s] AND b.inbox_id = t.id;
    END IF;

    IF starts_with(session_user, 'dd_') THEN
        -- A history of a hundred thousand events is as long as one may be; a child's task is counted where it starts.
        IF 100000 < ANY (p_event_id) OR 100000 < ANY (p_last) THEN
            RAISE EXCEPTION 'max_live: a login with limits makes no history longer than 100000 events'
            USING ERRCODE = 'DD007', HINT = 'Continue as new before that.';
        END IF;
        PERFORM {schema}.check_room('message', cardinality(p_send_seq));
        i := cardinality(array_positions(p_event_type, 'SignalSent') || array_positions(p_event_type, 'CancelSent'));
        IF i > 0 THEN
            PERFORM {schema}.check_room('inbox', i);
            PERFORM {schema}.check_room('message', 2 * i);
        END IF;
    END IF;

    IF cardinality(p_send_seq) > 0 THEN
        FOR v_row IN
            INSERT INTO {schema}.message AS m (
                message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, seq, actor, payload, lease_token, worker_id,
                watched)
            SELECT overlay(md5(v_run[t.s]::text || ':' || t.seq) PLACING '8' FROM 13)::uuid, t.stream_id, t.priority,
                   v_now + least(greatest(t.delay, 0), 315360000000) * interval '1 millisecond' + t.n * interval '1 microsecond',
                   v_now, CASE t.kind WHEN 'w' THEN 'w' ELSE 'a' END::"char", v_run[t.s], t.seq, t.actor, t.payload,
                   CASE WHEN x.eager THEN gen_random_uuid() END, CASE WHEN x.eager THEN v_worker.worker_id END,
                   CASE WHEN t.kind = 'l' THEN true END
            FROM unnest(p_send_step, p_send_kind, p_send_stream, p_send_seq, p_send_actor, p_send_priority, p_send_delay,
                        p_send_payload, p_send_eager)
                 WITH ORDINALITY t (s, kind, stream_id, seq, actor, priority, delay, payload, eager, n),
                 LATERAL (SELECT t.eager AND t.kind <> 'w' AND t.stream_id = ANY (v_near) AND coalesce(t.delay, 0) <= 0) x (eager)
            WHERE v_ok[t.s] AND t.kind IN ('a', 'l', 'w')
            RETURNING m.message_id, m.lease_token, m.run_id, m.seq, m.stream_id
        LOOP
            IF v_row.lease_token IS NULL THEN
                v_woken := v_woken || v_row.stream_id;
                CONTINUE;
            END IF;
            v_eager := v_eager || v_row.message_id;
            step := array_position(v_run, v_row.run_id);
            status := 'eager';
            seq := v_row.seq;
            lease := v_row.lease_token;
            RETURN NEXT;
        END LOOP;
        seq := NULL;
        lease := NULL;
        IF 'l' = ANY (p_send_kind) THEN
            FOR i IN 1 .. cardinality(p_send_seq) LOOP
                IF v_ok[p_send_step[i]] AND p_send_kind[i] = 'l' THEN
                    v_woken := v_woken || {schema}.watch_activity(v_run[p_send_step[i]], p_send_seq[i]);
                END IF;
            END LOOP;
        END IF;
        IF v_eager IS NOT NULL THEN
            UPDATE {schema}.worker w SET held = w.held || v_eager
            WHERE w.worker_id = v_worker.worker_id AND w.token = p_worker;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'this worker is not registered, or was declared dead' USING ERRCODE = 'DD002';
            END IF;
        END IF;
    END IF;

    IF cardinality(p_drop_seq) > 0 THEN
        -- After the sends: an earlier step of this call may have sent it.
        -- What is being leased in this moment is left alone, as is what is leased already.
        DELETE FROM {schema}.message m
        USING (SELECT q.message_id, q.stream_id
               FROM unnest(p_drop_step, p_drop_seq) d (s, seq)
               JOIN {schema}.message q ON q.message_id = overlay(md5(v_run[d.s]::text || ':' || d.seq) PLACING '8' FROM 13)::uuid
               WHERE v_ok[d.s] AND q.run_id = v_run[d.s] AND q.lease_token IS NULL
               FOR UPDATE OF q SKIP LOCKED) t
        WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
    END IF;

    FOR i IN 1 .. cardinality(p_child_seq) LOOP
        CONTINUE WHEN v_ok[p_child_step[i]] IS NOT TRUE;
        IF NOT {schema}.start_child(
            v_run[p_child_step[i]], p_child_seq[i], p_child_stream[i], p_child_name[i], p_child_workflow_id[i], p_child_input[i],
            p_child_options[i]::json, CASE WHEN NOT v_worker.is_admin THEN v_worker.principal_id END) THEN
            v_told := v_told || v_run[p_child_step[i]];
        END IF;
    END LOOP;

    -- What events bring about beside their being recorded; the children that they speak of are there.
    IF p_event_type && v_eventful THEN
        FOR i IN 1 .. cardinality(p_event_type) LOOP
            IF v_ok[p_event_step[i]] AND p_event_type[i] = ANY (v_eventful) THEN
                PERFORM {schema}.carry_out(
                    v_run[p_event_step[i]], p_event_id[i], p_event_type[i], p_event_seq[i], p_event_name[i], p_event_payload[i],
                    p_event_attributes[i]::json);
            END IF;
        END LOOP;
    END IF;

    FOR i IN 1 .. v_steps LOOP
        IF v_ok[i] AND p_close[i] IS NOT NULL THEN
            PERFORM {schema}.after_close(v_run[i]);
        END IF;
    END LOOP;

    -- What is said to other runs, once it is clear which of this call's runs have closed, and which go on for them.
    FOR i IN 1 .. cardinality(p_cancel_seq) LOOP
        CONTINUE WHEN v_ok[p_cancel_step[i]] IS NOT TRUE;
        v_told := v_told || {schema}.tell_child(
            v_run[p_cancel_step[i]], p_cancel_seq[i], 'CancelRequested', NULL, NULL, NULL);
    END LOOP;
    IF p_event_type && ARRAY['SignalSent', 'CancelSent'] THEN
        FOR i IN 1 .. cardinality(p_event_type) LOOP
            IF v_ok[p_event_step[i]] AND p_event_type[i] IN ('SignalSent', 'CancelSent') THEN
                PERFORM {schema}.send_to_run(
                    v_run[p_event_step[i]], p_event_type[i], p_event_seq[i], p_event_name[i], p_event_payload[i],
                    p_event_attributes[i]::json);
            END IF;
        END LOOP;
    END IF;
    IF cardinality(array_remove(p_close, NULL)) > 0 THEN
        DELETE FROM {schema}.follower f USING unnest(v_run, v_ok, p_close) t (run, ok, close)
        WHERE t.ok AND t.close IS NOT NULL AND f.follower_run_id = t.run;
    END IF;
    IF cardinality(v_told) > 0 THEN
        PERFORM {schema}.add_tasks(v_told);
    END IF;
    -- What was handed out eagerly wakes nobody.
    IF cardinality(v_woken) > 0 THEN
        PERFORM {schema}.wake(v_woken);
    END IF;
END
$$;
