-- Runs, from outside: start, signal, cancel, look; how they are ended is in ending.sql.
--
-- A run belongs to its stream: who may produce there may start runs, speak to all and look into those that it started
-- itself; who consumes the stream's workflows may speak to all and look into all.

-- Internal: give each of these runs a task, so that a worker looks into its inbox.
-- It comes before the first tasks of new runs: what was begun goes on.
-- Always a new row: whether an earlier task is still unclaimed cannot be known without waiting for somebody.
-- p_later: as for wake().
CREATE FUNCTION {schema}.add_tasks(p_runs uuid[], p_later boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_streams int[];
BEGIN
    WITH added AS (
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, actor, payload)
        SELECT gen_random_uuid(), r.stream_id, -1, v_now, v_now, 't', r.run_id, r.name, ''
        FROM unnest(p_runs) t (run_id) JOIN {schema}.run r ON r.run_id = t.run_id
        WHERE r.status = 'running'
        RETURNING stream_id)
    SELECT array_agg(DISTINCT a.stream_id) INTO v_streams FROM added a;
    IF v_streams IS NOT NULL THEN
        PERFORM {schema}.wake(v_streams, p_later);
    END IF;
END
$$;

-- Internal: whether the runs that had a workflow id before p_run forbid another one.  A live one forbids nothing here: that is
-- a conflict, and not reuse.
CREATE FUNCTION {schema}.is_used(p_workflow_id text, p_stream int, p_run uuid, p_reuse text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_latest text;
BEGIN
    IF p_reuse = 'allow' THEN
        RETURN false;
    END IF;
    SELECT r.status INTO v_latest FROM {schema}.run r
    WHERE r.workflow_id = p_workflow_id AND r.stream_id = p_stream AND r.run_id <> p_run
    -- Of two that began in the same millisecond, the one that is live, or did not go on as the other, is the latest.
    ORDER BY r.started_at DESC, r.status = 'running' DESC, (r.next_run_id IS NULL) DESC LIMIT 1;
    RETURN FOUND AND v_latest <> 'running' AND (p_reuse = 'reject' OR v_latest = 'completed');
END
$$;

-- Internal: a new run with its first event and its first task.  The run id is the first task's message id.
-- Answers 'started'; 'exists' and its run id, when a live run has the workflow id; 'used', when only closed ones have it and
-- p_reuse forbids it; 'busy'.  The same run id again is the same run: 'started'.
-- p_conflict: fail, use_existing, terminate_existing; p_reuse: allow, allow_failed, reject.
-- p_options: what the run is started with beside its input, an object or NULL: it is the first event's attributes.
-- p_principal: who starts it; NULL: an administrator.  'denied': it may not terminate the existing one.
CREATE FUNCTION {schema}.create_run(
    p_run uuid, p_workflow_id text, p_stream int, p_name text, p_input bytea, p_conflict text, p_reuse text, p_delay bigint,
    p_options json, p_parent uuid, p_parent_seq int, p_parent_close text, p_principal int,
    OUT status text, OUT run_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := date_trunc('milliseconds', clock_timestamp());
    -- History's clock starts when the run may take its first step.
    v_due timestamptz := v_now + least(greatest(p_delay, 0), 315360000000) * interval '1 millisecond';
    v_live uuid;
    v_starter int;
    v_ended boolean := false;
BEGIN
    create_run.run_id := p_run;
    IF p_reuse <> 'allow' AND NOT EXISTS (SELECT 1 FROM {schema}.run r WHERE r.run_id = p_run)
       AND {schema}.is_used(p_workflow_id, p_stream, p_run, p_reuse) THEN
        create_run.status := 'used';
        RETURN;
    END IF;
    -- Its first task; its deadline, if it has one, is there as long as it lives.
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('run', 1);
        PERFORM {schema}.check_room('message', 1);
    END IF;
    -- Each try is lost to another one's commit: as many in a row as there may be who fight over a workflow id.
    FOR v_try IN 1 .. 30 LOOP
        INSERT INTO {schema}.run (
            run_id, workflow_id, stream_id, name, started_at, last_event, parent_run_id, parent_seq, parent_close, memo, principal_id)
        VALUES (p_run, p_workflow_id, p_stream, p_name, v_now, 1, p_parent, p_parent_seq, coalesce(p_parent_close, 'terminate'),
                p_options -> 'memo', p_principal)
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            -- The insert may have waited for the end of a run that was live when we looked.
            IF NOT v_ended AND {schema}.is_used(p_workflow_id, p_stream, p_run, p_reuse) THEN
                DELETE FROM {schema}.run r WHERE r.run_id = p_run;
                create_run.status := 'used';
                RETURN;
            END IF;
            INSERT INTO {schema}.event (run_id, event_id, type, at, name, payload, attributes)
            VALUES (p_run, 1, 'WorkflowStarted', v_due, p_name, p_input, p_options);
            IF p_options IS NOT NULL THEN
                PERFORM {schema}.begin_state(p_run, p_options);
            END IF;
            INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, actor, payload)
            VALUES (p_run, p_stream, 0, v_due, v_now, 's', p_run, p_name, '');
            IF p_options IS NOT NULL THEN
                PERFORM {schema}.set_deadline(p_run, v_due, p_options, NULL);
            END IF;
            create_run.status := 'started';
            RETURN;
        END IF;
        IF EXISTS (SELECT 1 FROM {schema}.run r WHERE r.run_id = p_run AND r.workflow_id = p_workflow_id AND r.stream_id = p_stream) THEN
            create_run.status := 'started';
            RETURN;
        END IF;
        SELECT r.run_id, r.principal_id INTO v_live, v_starter FROM {schema}.run r
        WHERE r.workflow_id = p_workflow_id AND r.stream_id = p_stream AND r.status = 'running';
        IF FOUND AND p_conflict = 'terminate_existing' AND NOT {schema}.may_read(p_principal, p_stream, v_starter) THEN
            create_run.status := 'denied';
            create_run.run_id := NULL;
            RETURN;
        ELSIF FOUND AND p_conflict = 'terminate_existing' THEN
            v_ended := {schema}.end_run(
                v_live, 'terminated', 'WorkflowTerminated', 'another run took the workflow id') = 'ok';
        ELSIF FOUND THEN
            create_run.status := 'exists';
            create_run.run_id := v_live;
            RETURN;
        END IF;
    END LOOP;
    create_run.status := 'busy';
END
$$;

-- Start runs.  Answers per position: started; exists (with the live run that has the workflow id); used
-- (closed runs have it, and p_reuses forbids that); denied; busy (try again).
CREATE FUNCTION {schema}.start_runs(
    p_sender uuid, p_batch bigint, p_runs uuid[], p_workflow_ids text[], p_streams int[], p_names text[], p_inputs bytea[],
    p_conflicts text[], p_reuses text[], p_delays bigint[], p_options text[])
RETURNS TABLE (status text, run_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_caller record;
    v_may int[];
    v_new record;
    i int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    v_may := {schema}.permitted(v_caller.principal_id, v_caller.is_admin, p_streams, 'p');
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_runs));
    FOR i IN 1 .. cardinality(p_runs) LOOP
        -- Ids of version 8 are the database's own, derived from a run.
        IF p_streams[i] = ANY (v_may) AND substr(p_runs[i]::text, 15, 1) IS DISTINCT FROM '8' THEN
            SELECT * INTO v_new FROM {schema}.create_run(
                p_runs[i], p_workflow_ids[i], p_streams[i], p_names[i], p_inputs[i], p_conflicts[i], p_reuses[i], p_delays[i],
                p_options[i]::json, NULL, NULL, NULL, CASE WHEN NOT v_caller.is_admin THEN v_caller.principal_id END);
            status := v_new.status;
            run_id := v_new.run_id;
        ELSE
            status := 'denied';
            run_id := NULL;
        END IF;
        RETURN NEXT;
    END LOOP;
    PERFORM {schema}.wake(v_may, p_sender IS NULL);
END
$$;

-- Internal: the run that a caller means: by run id, else the live (or else the latest) one with this workflow id.
-- p_what: r: to look into it, or end it, as may_read() says;  e: to speak to it, as permitted() says.
-- NULL where there is none or the caller may not do so: foreign and missing look the same.
CREATE FUNCTION {schema}.find_run(p_run uuid, p_workflow_id text, p_what text)
RETURNS {schema}.run
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
-- Also because a plan that is made for its values shows them to whoever sets debug_print_plan.
SET plan_cache_mode = force_generic_plan
-- Its plan for values that are not known looks dear, and takes a tenth of a second to compile where the server does so.
SET jit = off
AS $$
DECLARE
    v_caller record;
    v_run {schema}.run;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    -- In one look: nothing is known of a run, here either, before it is clear that it may be.
    IF p_run IS NOT NULL THEN
        SELECT r.* INTO v_run FROM {schema}.run r
        WHERE r.run_id = p_run
          AND (v_caller.is_admin OR EXISTS (
              SELECT 1 FROM {schema}.stream_grant g
              WHERE g.principal_id = v_caller.principal_id AND g.stream_id = r.stream_id
                AND (g.consume AND v_caller.kind <> 'activity'
                     OR g.produce AND (p_what = 'e' OR r.principal_id = v_caller.principal_id))));
    ELSE
        SELECT r.* INTO v_run FROM {schema}.run r
        WHERE r.workflow_id = p_workflow_id
          AND (v_caller.is_admin OR EXISTS (
              SELECT 1 FROM {schema}.stream_grant g
              WHERE g.principal_id = v_caller.principal_id AND g.stream_id = r.stream_id
                AND (g.consume AND v_caller.kind <> 'activity'
                     OR g.produce AND (p_what = 'e' OR r.principal_id = v_caller.principal_id))))
        ORDER BY (r.status = 'running') DESC, r.started_at DESC, (r.next_run_id IS NULL) DESC LIMIT 1;
    END IF;
    RETURN v_run;
END
$$;

-- Put signals and cancels (p_types: SignalReceived, CancelRequested) into inboxes.  p_traces: the spans that they come from
-- (a W3C traceparent; what is none is left out).
-- Answers per position: ok; duplicate (this key came before); closed; missing.
-- The key-share lock does not hinder the run's steps; only closing the run waits for none of it: it is undone instead.
CREATE FUNCTION {schema}.post(
    p_sender uuid, p_batch bigint, p_runs uuid[], p_workflow_ids text[], p_types text[], p_names text[], p_payloads bytea[],
    p_keys text[], p_traces text[] DEFAULT NULL)
RETURNS text[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_run {schema}.run;
    v_status text;
    v_told uuid[] := '{}';
    v_answer text[] := '{}';
    i int;
BEGIN
    PERFORM {schema}.caller();
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('inbox', cardinality(p_types));
        PERFORM {schema}.check_room('message', cardinality(p_types));
    END IF;
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_types));
    FOR i IN 1 .. cardinality(p_types) LOOP
        v_run := {schema}.find_run(p_runs[i], p_workflow_ids[i], 'e');
        v_run := {schema}.lock_live(v_run);
        v_status := CASE WHEN v_run.run_id IS NULL OR p_types[i] NOT IN ('SignalReceived', 'CancelRequested') THEN 'missing'
                    ELSE {schema}.post_one(v_run, p_types[i], p_keys[i], p_names[i], p_payloads[i], p_traces[i]) END;
        v_answer := v_answer || v_status;
        IF v_status = 'ok' THEN
            v_told := v_told || v_run.run_id;
        END IF;
    END LOOP;
    PERFORM {schema}.add_tasks(v_told, p_sender IS NULL);
    RETURN v_answer;
END
$$;

-- Internal: lock the run that a message is meant for, with a key-share lock: while it is held the run does not close.
-- Whoever means a run that has gone on as another means that one; it may do so in this very moment.
CREATE FUNCTION {schema}.lock_live(p_run {schema}.run)
RETURNS {schema}.run
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run {schema}.run := p_run;
BEGIN
    FOR v_try IN 1 .. 5 LOOP
        v_run := {schema}.live_run(v_run);
        SELECT r.* INTO v_run FROM {schema}.run r WHERE r.run_id = v_run.run_id FOR KEY SHARE;
        EXIT WHEN v_run.status = 'running' OR v_run.next_run_id IS NULL;
    END LOOP;
    RETURN v_run;
END
$$;

-- Internal: what is noted of the span that a signal or a cancel comes from (a W3C traceparent); NULL for what is none.
CREATE FUNCTION {schema}.trace_of(p_trace text)
RETURNS json
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_trace COLLATE pg_catalog."C" ~ '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$' THEN
        json_build_object('trace', json_build_object('traceparent', p_trace)) END;
END
$$;

-- Internal: put a signal or a cancel into the inbox of a run, which the caller has locked with lock_live().
-- Answers ok; duplicate (this key came before, to any run of its chain); closed.
CREATE FUNCTION {schema}.post_one(p_run {schema}.run, p_type text, p_key text, p_name text, p_payload bytea,
                               p_trace text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_chain uuid := coalesce(p_run.first_run_id, p_run.run_id);
BEGIN
    IF p_run.status <> 'running' THEN
        -- What was taken before the end, and is only repeated because its answer was lost, did arrive.
        RETURN CASE WHEN EXISTS (SELECT 1 FROM {schema}.signal_key k WHERE k.run_id = v_chain AND k.key = p_key)
               THEN 'duplicate' ELSE 'closed' END;
    END IF;
    IF p_key IS NOT NULL THEN
        IF starts_with(session_user, 'dd_') THEN
            PERFORM {schema}.check_room('signal_key', 1, v_chain);
        END IF;
        INSERT INTO {schema}.signal_key (run_id, key) VALUES (v_chain, p_key) ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            RETURN 'duplicate';
        END IF;
    END IF;
    INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
    VALUES (p_run.run_id, p_type, p_name, p_payload, {schema}.trace_of(p_trace));
    RETURN 'ok';
END
$$;

-- One run, as its caller may see it: no row where it is missing or foreign.  next_run_id: the last of the runs that go on
-- for it; a chain may be long.
CREATE FUNCTION {schema}.get_run(p_run uuid, p_workflow_id text)
RETURNS TABLE (
    run_id uuid, workflow_id text, name text, queue_name text, status text, started_at timestamptz, closed_at timestamptz,
    last_event int, parent_run_id uuid, memo text, task_failure text, parent_workflow_id text, next_run_id uuid)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
-- The end of a chain is the last of an index, however long the chain is.
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
AS $$
DECLARE
    v_run {schema}.run := {schema}.find_run(p_run, p_workflow_id, 'r');
BEGIN
    RETURN QUERY
        SELECT v_run.run_id, v_run.workflow_id, v_run.name, s.name, v_run.status, v_run.started_at, v_run.closed_at,
               v_run.last_event, v_run.parent_run_id, v_run.memo::text, v_run.task_failure,
               (SELECT r.workflow_id FROM {schema}.run r WHERE r.run_id = v_run.parent_run_id),
               CASE WHEN v_run.next_run_id IS NOT NULL THEN (
                   SELECT r.run_id FROM {schema}.run r
                   WHERE r.workflow_id = v_run.workflow_id AND r.stream_id = v_run.stream_id
                     AND r.first_run_id = coalesce(v_run.first_run_id, v_run.run_id)
                   ORDER BY r.started_at DESC, (r.next_run_id IS NULL) DESC LIMIT 1) END
        FROM {schema}.stream s WHERE s.stream_id = v_run.stream_id;
END
$$;

-- How the database has ended a run, for its last span: no row where it lives, or its code has ended it, or the caller may
-- not see it.  Times are milliseconds since the epoch; facts: what its place in a trace follows from.
CREATE FUNCTION {schema}.get_closing(p_run uuid)
RETURNS TABLE (
    run_id uuid, workflow_id text, name text, queue_name text, status text, started_at bigint, closed_at bigint, reason text,
    facts text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    v_run {schema}.run := {schema}.find_run(p_run, NULL, 'r');
BEGIN
    IF v_run.status IN ('terminated', 'timed_out') THEN
        RETURN QUERY
            SELECT v_run.run_id, v_run.workflow_id, v_run.name, s.name, v_run.status,
                   (extract(epoch FROM v_run.started_at) * 1000)::bigint, (extract(epoch FROM e.at) * 1000)::bigint,
                   e.attributes ->> 'reason',
                   (SELECT json_build_object('trace', f.facts -> 'trace', 'first', f.facts -> 'first')::text
                    FROM (SELECT {schema}.readable(b.attributes) AS facts FROM {schema}.event b
                          WHERE b.run_id = v_run.run_id AND b.event_id = 1) f)
            FROM {schema}.stream s
            JOIN {schema}.event e ON e.run_id = v_run.run_id AND e.event_id = v_run.last_event
            WHERE s.stream_id = v_run.stream_id;
    END IF;
END
$$;

-- The history of a run after an event, oldest first, or the first p_most events of that.  Times are milliseconds since
-- the epoch.
CREATE FUNCTION {schema}.get_history(p_run uuid, p_after int, p_most int DEFAULT NULL)
RETURNS TABLE (event_id int, type text, at bigint, seq int, name text, payload bytea, attributes text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run {schema}.run := {schema}.find_run(p_run, NULL, 'r');
BEGIN
    RETURN QUERY
        SELECT e.event_id, e.type, (extract(epoch FROM e.at) * 1000)::bigint, e.seq, e.name, e.payload, e.attributes::text
        FROM {schema}.event e WHERE e.run_id = v_run.run_id AND e.event_id > p_after ORDER BY e.event_id
        LIMIT p_most;
END
$$;

-- "Tell this channel when the run closes."  Answers the run's status now: the caller registers first and looks then.
CREATE FUNCTION {schema}.await_run(p_run uuid, p_channel uuid)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    v_run {schema}.run := {schema}.find_run(p_run, NULL, 'r');
    v_status text;
BEGIN
    -- Whoever waits too often is not told, and finds out by looking.
    IF v_run.status = 'running' AND (NOT starts_with(session_user, 'dd_') OR {schema}.has_room(session_user, 'waiter', 1)) THEN
        INSERT INTO {schema}.waiter (run_id, channel, until)
        VALUES (v_run.run_id, p_channel, clock_timestamp() + interval '1 hour')
        ON CONFLICT (run_id, channel) DO UPDATE SET until = excluded.until;
    END IF;
    RETURN v_run.status;
END
$$;
