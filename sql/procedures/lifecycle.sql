-- The life of runs beyond one run: time limits, who goes on where a run closed, resets, children.
--
-- Runs that follow each other (continue-as-new, retries, resets) are a chain: one workflow id, one stream, one parent.
-- next_run_id leads from run to run, and whoever means an earlier one with a signal or a cancel reaches the live one.

-- Internal: the id of what belongs to a run: a command's message (p_what: its number), its deadline, the next run.
CREATE FUNCTION {schema}.derived_id(p_run uuid, p_what text)
RETURNS uuid
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN overlay(md5(p_run::text || ':' || p_what) PLACING '8' FROM 13)::uuid;
END
$$;

-- Internal: attributes of an event, so that they can be read: no operator takes a json that has a NUL, or half of a
-- surrogate pair, anywhere, as texts of failures may.  For looking at other members than those texts.
CREATE FUNCTION {schema}.readable(p_attributes json)
RETURNS json
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN regexp_replace(p_attributes::text, '(?<!\\)((?:\\\\)*)\\u(0000|[dD][89a-fA-F]..)', '\1?', 'g')::json;
END
$$;

-- Internal: facts (an object, or NULL) with one of them replaced; p_value NULL: left out.
CREATE FUNCTION {schema}.with_fact(p_facts json, p_key text, p_value json)
RETURNS json
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT json_object_agg(f.key, f.value)
            FROM (SELECT e.key, e.value FROM json_each(coalesce(p_facts, '{}'::json)) e WHERE e.key <> p_key
                  UNION ALL SELECT p_key, p_value WHERE p_value IS NOT NULL) f);
END
$$;

-- Internal: the facts of a run that goes on for another, with the first of its chain: where nobody began a trace, the whole
-- chain is in that run's.
CREATE FUNCTION {schema}.with_first(p_facts json, p_run {schema}.run)
RETURNS json
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_facts -> 'trace' IS NOT NULL THEN p_facts
           ELSE {schema}.with_fact(p_facts, 'first', to_json(coalesce(p_run.first_run_id, p_run.run_id)::text)) END;
END
$$;

-- Internal: a fact that is a number, and not without end; NULL where it is none.  Whoever may start a run says what its
-- facts are, and others are to end it.
CREATE FUNCTION {schema}.fact_number(p_facts json, p_key text)
RETURNS float8
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF json_typeof(p_facts -> p_key) IS DISTINCT FROM 'number' THEN
        RETURN NULL;
    END IF;
    RETURN least(greatest((p_facts ->> p_key)::numeric, -1e15), 1e15);
END
$$;

-- Internal: a fact that is a number of milliseconds, as a length of time; NULL where it is none.
CREATE FUNCTION {schema}.fact_interval(p_facts json, p_key text)
RETURNS interval
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Where there is none, least() and greatest() would make one of it.
    IF p_facts ->> p_key IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN least(greatest((p_facts ->> p_key)::numeric, 0), 315360000000)::bigint * interval '1 millisecond';
END
$$;

-- Internal: have a run ended when its time is over: run_timeout and execution_timeout (milliseconds, in its facts) count
-- from its first step.  p_deadline: that of the chain which it goes on with, or NULL.
-- The deadline is a message of its stream: whichever worker claims it has the database end the run.
CREATE FUNCTION {schema}.set_deadline(p_run uuid, p_from timestamptz, p_facts json, p_deadline timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_deadline timestamptz := coalesce(p_deadline, p_from + {schema}.fact_interval(p_facts, 'execution_timeout'));
    v_due timestamptz := least(v_deadline, p_from + {schema}.fact_interval(p_facts, 'run_timeout'));
BEGIN
    IF v_due IS NULL THEN
        RETURN;
    END IF;
    UPDATE {schema}.run r SET execution_deadline = v_deadline WHERE r.run_id = p_run AND v_deadline IS NOT NULL;
    INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, actor, payload)
    SELECT {schema}.derived_id(p_run, 'deadline'), r.stream_id, -1, v_due, clock_timestamp(), 'e', p_run, r.name, ''
    FROM {schema}.run r WHERE r.run_id = p_run
    ON CONFLICT (message_id, stream_id) DO UPDATE SET due_at = excluded.due_at;
END
$$;

-- The time of the runs is over whose deadlines (kind e) are leased to this worker: end those that still live.
-- A run that somebody is at in this moment is tried again at once.  Answers the positions whose lease is gone.
CREATE FUNCTION {schema}.expire_runs(p_worker uuid, p_messages uuid[], p_leases uuid[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker record;
    v_id uuid;
    v_run {schema}.run;
    v_stream int;
    v_refused int[] := '{}';
    i int;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    FOR i IN 1 .. cardinality(p_messages) LOOP
        SELECT m.run_id, m.stream_id INTO v_id, v_stream FROM {schema}.message m
        WHERE m.message_id = p_messages[i] AND m.lease_token = p_leases[i] AND m.worker_id = v_worker.worker_id
          AND m.kind = 'e';
        IF NOT FOUND THEN
            v_refused := v_refused || i;
            CONTINUE;
        END IF;
        SELECT r.* INTO v_run FROM {schema}.run r WHERE r.run_id = v_id;
        IF v_run.status = 'running' AND NOT {schema}.lock_tree(v_id) THEN
            UPDATE {schema}.message m
            SET lease_token = NULL, worker_id = NULL, due_at = clock_timestamp() + interval '50 milliseconds'
            WHERE m.message_id = p_messages[i] AND m.lease_token = p_leases[i];
            PERFORM {schema}.wake(ARRAY[v_stream]);
            CONTINUE;
        END IF;
        IF v_run.status = 'running' THEN
            PERFORM {schema}.end_run(
                v_id, 'timed_out', 'WorkflowTimedOut',
                CASE WHEN v_run.execution_deadline <= clock_timestamp() THEN 'execution_timeout' ELSE 'run_timeout' END);
        END IF;
        DELETE FROM {schema}.message m
        WHERE m.message_id = p_messages[i] AND m.lease_token = p_leases[i] AND m.worker_id = v_worker.worker_id;
        IF NOT FOUND THEN
            -- The worker was declared dead between the look above and here: nothing is recorded, somebody else does it.
            RAISE EXCEPTION 'a lease was lost in this very moment' USING ERRCODE = '40001';
        END IF;
    END LOOP;
    RETURN v_refused;
END
$$;

-- Internal: start the run that goes on where this one closed, if one does: the next of continue-as-new, or the next
-- attempt of one that failed or ran out of its run's time.  Answers its id, or NULL.
-- What the closed run was sent and has not read goes to it, in order.
CREATE FUNCTION {schema}.go_on(p_run {schema}.run)
RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_last {schema}.event;
    v_facts json;
    v_input bytea;
    v_retry json;
    v_attempt int;
    v_delay bigint := 0;
    v_next uuid := {schema}.derived_id(p_run.run_id, 'next');
    v_new record;
BEGIN
    IF p_run.status NOT IN ('continued_as_new', 'failed', 'timed_out') THEN
        RETURN NULL;
    END IF;
    SELECT e.* INTO v_last FROM {schema}.event e WHERE e.run_id = p_run.run_id AND e.event_id = p_run.last_event;
    v_last.attributes := {schema}.readable(v_last.attributes);
    IF p_run.status = 'continued_as_new' THEN
        v_facts := v_last.attributes -> 'facts';
        v_input := v_last.payload;
        v_delay := coalesce((v_last.attributes ->> 'delay_ms')::bigint, 0);
    ELSE
        SELECT e.attributes, e.payload INTO v_facts, v_input
        FROM {schema}.event e WHERE e.run_id = p_run.run_id AND e.event_id = 1;
        v_retry := v_facts -> 'retry';
        v_attempt := least(greatest(coalesce({schema}.fact_number(v_facts, 'attempt'), 1), 1), 2147483646);
        IF v_retry IS NULL OR json_typeof(v_retry) <> 'object'
           OR v_attempt >= {schema}.fact_number(v_retry, 'attempts')
           OR (p_run.status = 'failed' AND v_last.attributes #>> '{failure,retryable}' = 'false')
           OR (p_run.status = 'timed_out' AND (
               v_last.attributes ->> 'reason' <> 'run_timeout' OR EXISTS (
                   SELECT 1 FROM {schema}.event e WHERE e.run_id = p_run.run_id AND e.type = 'CancelRequested'))) THEN
            RETURN NULL;
        END IF;
        -- The exponent is bounded, so that no number of attempts is too much for a float.
        v_delay := least(greatest(coalesce({schema}.fact_number(v_last.attributes, 'retry_delay_ms'), least(
            {schema}.fact_number(v_retry, 'initial')
                * exp(least((v_attempt - 1) * ln(greatest({schema}.fact_number(v_retry, 'coefficient'), 1)), 27)),
            {schema}.fact_number(v_retry, 'maximum'), 315360000000)), 0), 315360000000)::bigint;
        IF clock_timestamp() + v_delay * interval '1 millisecond' >= p_run.execution_deadline THEN
            RETURN NULL;
        END IF;
        v_facts := {schema}.with_fact({schema}.with_fact(v_facts, 'origin', NULL), 'attempt', to_json(v_attempt + 1));
        v_facts := {schema}.with_fact(v_facts, 'outputs', {schema}.next_output(p_run.run_id, v_facts));
    END IF;
    v_facts := {schema}.with_fact(v_facts, 'previous', to_json(p_run.run_id::text));
    v_facts := {schema}.with_first(v_facts, p_run);
    SELECT * INTO v_new FROM {schema}.create_run(
        v_next, p_run.workflow_id, p_run.stream_id, p_run.name, v_input, 'fail', 'allow', v_delay, v_facts,
        p_run.parent_run_id, p_run.parent_seq, p_run.parent_close, p_run.principal_id);
    IF v_new.status <> 'started' THEN
        RAISE EXCEPTION 'the workflow id is being fought over' USING ERRCODE = '55P03';
    END IF;
    UPDATE {schema}.run r SET first_run_id = coalesce(p_run.first_run_id, p_run.run_id) WHERE r.run_id = v_next;
    UPDATE {schema}.run r SET next_run_id = v_next WHERE r.run_id = p_run.run_id;
    UPDATE {schema}.follower f SET run_id = v_next WHERE f.run_id = p_run.run_id;
    IF p_run.execution_deadline IS NOT NULL THEN
        PERFORM {schema}.set_deadline(
            v_next, clock_timestamp() + v_delay * interval '1 millisecond', v_facts, p_run.execution_deadline);
    END IF;
    -- First what its code had been given and left unread, then what it was never given.
    INSERT INTO {schema}.inbox (run_id, type, at, name, payload, attributes)
    SELECT v_next, CASE e.type WHEN 'UpdateAccepted' THEN 'UpdateRequested' ELSE e.type END, e.at, e.name, e.payload,
           CASE e.type WHEN 'UpdateAccepted' THEN e.attributes END
    FROM json_array_elements_text(v_last.attributes -> 'unread') u (id)
    JOIN {schema}.event e ON e.run_id = p_run.run_id AND e.event_id = u.id::int AND e.type IN ('SignalReceived', 'UpdateAccepted')
    ORDER BY e.event_id;
    INSERT INTO {schema}.inbox (run_id, type, at, name, payload, attributes)
    SELECT v_next, i.type, i.at, i.name, i.payload, i.attributes
    FROM {schema}.inbox i
    WHERE i.run_id = p_run.run_id AND i.type IN ('SignalReceived', 'CancelRequested', 'UpdateRequested')
    ORDER BY i.inbox_id;
    PERFORM {schema}.hand_over_updates(p_run.run_id, v_next, false);
    -- A cancel does not wait for the next attempt's time.
    IF v_delay > 0 AND EXISTS (SELECT 1 FROM {schema}.inbox i WHERE i.run_id = v_next AND i.type = 'CancelRequested') THEN
        PERFORM {schema}.add_tasks(ARRAY[v_next]);
    END IF;
    PERFORM {schema}.wake(ARRAY[p_run.stream_id]);
    RETURN v_next;
END
$$;

-- Internal: the live run that goes on for one that closed, if any; else that run itself.
-- Not from run to run: a chain may be long.
CREATE FUNCTION {schema}.live_run(p_run {schema}.run)
RETURNS {schema}.run
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_live {schema}.run;
BEGIN
    IF p_run.status = 'running' OR p_run.next_run_id IS NULL THEN
        RETURN p_run;
    END IF;
    SELECT r.* INTO v_live FROM {schema}.run r
    WHERE r.workflow_id = p_run.workflow_id AND r.stream_id = p_run.stream_id AND r.status = 'running'
      AND r.first_run_id = coalesce(p_run.first_run_id, p_run.run_id);
    RETURN CASE WHEN v_live.run_id IS NULL THEN p_run ELSE v_live END;
END
$$;

-- Internal: put news into the inbox of the run behind a command that started a child.  Answers that run, for add_tasks;
-- NULL where it has closed.
-- The key-share lock keeps it from closing over the news; who closes it in this moment is not waited for (55P03).
CREATE FUNCTION {schema}.tell_child(
    p_run uuid, p_seq int, p_type text, p_name text, p_payload bytea, p_attributes json)
RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_child uuid := {schema}.child_run(p_run, p_seq);
BEGIN
    IF v_child IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM 1 FROM {schema}.run r WHERE r.run_id = v_child AND r.status = 'running' FOR KEY SHARE SKIP LOCKED;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the child is being closed in this moment' USING ERRCODE = '55P03';
    END IF;
    INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
    VALUES (v_child, p_type, p_name, p_payload, p_attributes);
    RETURN v_child;
END
$$;

-- Internal: the live run behind a command that started a child (or follows a run that was there); NULL: it has closed.
CREATE FUNCTION {schema}.child_run(p_run uuid, p_seq int)
RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_child uuid;
BEGIN
    SELECT r.run_id INTO v_child FROM {schema}.run r
    WHERE r.parent_run_id = p_run AND r.parent_seq = p_seq AND r.status = 'running';
    IF NOT FOUND THEN
        SELECT r.run_id INTO v_child FROM {schema}.follower f JOIN {schema}.run r ON r.run_id = f.run_id
        WHERE f.follower_run_id = p_run AND f.seq = p_seq AND r.status = 'running';
    END IF;
    RETURN v_child;
END
$$;

-- Internal: a step starts a child (p_options as its command says).  Answers whether it did; what stands in its way is news
-- for the parent: false.  A child that the run had before it was reset is started already.
-- p_principal: whose worker takes the step; NULL: an administrator's.  Its rights decide whether a run that is there may be
-- ended, or followed.
CREATE FUNCTION {schema}.start_child(
    p_run uuid, p_seq int, p_stream int, p_name text, p_workflow_id text, p_input bytea, p_options json, p_principal int)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_options record;
    v_new record;
    v_starter int;
BEGIN
    IF EXISTS (SELECT 1 FROM {schema}.run r WHERE r.parent_run_id = p_run AND r.parent_seq = p_seq)
       OR EXISTS (SELECT 1 FROM {schema}.follower f WHERE f.follower_run_id = p_run AND f.seq = p_seq) THEN
        RETURN true;
    END IF;
    SELECT * INTO v_options FROM json_to_record(p_options) x (
        id_conflict text, id_reuse text, parent_close text, delay bigint, facts json);
    IF v_options.id_reuse <> 'allow' AND EXISTS (
        SELECT 1 FROM {schema}.event e JOIN {schema}.event w ON w.run_id = e.run_id AND w.event_id > e.event_id
        WHERE e.run_id = p_run AND e.type = 'ChildStarted' AND e.seq = p_seq AND w.type = 'WorkflowReset') THEN
        -- A reset starts it again: the run that had the id was this very child.
        v_options.id_reuse := 'allow';
    END IF;
    -- Whose child it was started as: that run may be reset, and another be its parent then.
    v_options.facts := {schema}.with_fact(v_options.facts, 'parent', (
        SELECT json_build_object('workflow_id', r.workflow_id, 'run_id', r.run_id) FROM {schema}.run r WHERE r.run_id = p_run));
    SELECT * INTO v_new FROM {schema}.create_run(
        {schema}.derived_id(p_run, p_seq::text), p_workflow_id, p_stream, p_name, p_input,
        coalesce(v_options.id_conflict, 'fail'), coalesce(v_options.id_reuse, 'allow'), coalesce(v_options.delay, 0),
        v_options.facts, p_run, p_seq, v_options.parent_close, p_principal);
    IF v_new.status = 'busy' THEN
        RAISE EXCEPTION 'the workflow id is being fought over' USING ERRCODE = '55P03';
    ELSIF v_new.status = 'started' THEN
        RETURN true;
    ELSIF v_new.status = 'exists' AND v_options.id_conflict = 'use_existing' AND v_new.run_id <> p_run THEN
        SELECT r.principal_id INTO v_starter FROM {schema}.run r
        WHERE r.run_id = v_new.run_id AND r.status = 'running' FOR KEY SHARE SKIP LOCKED;
        IF FOUND AND NOT {schema}.may_read(p_principal, p_stream, v_starter) THEN
            NULL;
        ELSIF FOUND THEN
            INSERT INTO {schema}.follower (follower_run_id, seq, run_id) VALUES (p_run, p_seq, v_new.run_id);
            RETURN true;
        ELSIF EXISTS (SELECT 1 FROM {schema}.run r WHERE r.run_id = v_new.run_id AND r.status = 'running') THEN
            RAISE EXCEPTION 'the run is being closed in this moment' USING ERRCODE = '55P03';
        END IF;
    END IF;
    INSERT INTO {schema}.inbox (run_id, type, seq, name, attributes)
    VALUES (p_run, 'ChildStartFailed', p_seq, p_name, json_build_object('workflow_id', p_workflow_id));
    RETURN false;
END
$$;

-- Internal: a run asks whether its child (command p_child) was started.  The answer is news for it, without a run id where
-- the child was cancelled in the very step; where its id is taken, the news of that is there already.
CREATE FUNCTION {schema}.confirm_child(p_run uuid, p_seq int, p_child int)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_child uuid;
BEGIN
    SELECT r.run_id INTO v_child FROM {schema}.run r
    WHERE r.parent_run_id = p_run AND r.parent_seq = p_child ORDER BY r.started_at LIMIT 1;
    IF NOT FOUND THEN
        SELECT f.run_id INTO v_child FROM {schema}.follower f WHERE f.follower_run_id = p_run AND f.seq = p_child;
    END IF;
    IF v_child IS NOT NULL OR NOT EXISTS (
        SELECT 1 FROM {schema}.inbox i WHERE i.run_id = p_run AND i.type = 'ChildStartFailed' AND i.seq = p_child) THEN
        INSERT INTO {schema}.inbox (run_id, type, seq, attributes)
        VALUES (p_run, 'ChildStartConfirmed', p_seq,
                json_strip_nulls(json_build_object('child', p_child, 'run_id', v_child)));
        PERFORM {schema}.add_tasks(ARRAY[p_run]);
    END IF;
END
$$;

-- The children of a run, in the order in which it started them: of each the run that went on for it last.
CREATE FUNCTION {schema}.list_children(p_run uuid, p_workflow_id text)
RETURNS TABLE (run_id uuid, workflow_id text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    v_caller record;
    v_run {schema}.run := {schema}.find_run(p_run, p_workflow_id, 'r');
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    RETURN QUERY
        SELECT c.run_id, c.workflow_id
        FROM (SELECT DISTINCT ON (r.parent_seq) r.* FROM {schema}.run r
              WHERE r.parent_run_id = v_run.run_id
              ORDER BY r.parent_seq, r.started_at DESC, (r.next_run_id IS NULL) DESC) c
        WHERE v_caller.is_admin OR {schema}.may_read(v_caller.principal_id, c.stream_id, c.principal_id)
        ORDER BY c.parent_seq;
END
$$;
