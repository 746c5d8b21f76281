-- Messages to runs that come with something else: with the start of a run, or with a step of another run.

-- Start runs, each with a signal or an update (p_with_types: SignalReceived, UpdateRequested) that comes in the same
-- transaction, also where a live run has the workflow id and p_conflicts says use_existing.  p_with_keys are the ids under
-- which each is taken once.
-- p_with_traces: the spans that they come from, as for post().
-- Answers as start_runs(); closed where the run that has the id has ended and takes no message.
CREATE FUNCTION {schema}.start_runs_with(
    p_sender uuid, p_batch bigint, p_runs uuid[], p_workflow_ids text[], p_streams int[], p_names text[], p_inputs bytea[],
    p_conflicts text[], p_reuses text[], p_delays bigint[], p_options text[],
    p_with_types text[], p_with_names text[], p_with_payloads bytea[], p_with_keys text[], p_with_traces text[] DEFAULT NULL)
RETURNS TABLE (status text, run_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
#variable_conflict use_column
DECLARE
    v_caller record;
    v_may int[];
    v_new record;
    v_run {schema}.run;
    v_posted text;
    v_told uuid[] := '{}';
    i int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    v_may := {schema}.permitted(v_caller.principal_id, v_caller.is_admin, p_streams, 'p');
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_runs));
    FOR i IN 1 .. cardinality(p_runs) LOOP
        IF (p_streams[i] = ANY (v_may)) IS NOT TRUE OR substr(p_runs[i]::text, 15, 1) IS NOT DISTINCT FROM '8'
           OR (p_with_types[i] IN ('SignalReceived', 'UpdateRequested')) IS NOT TRUE THEN
            status := 'denied';
            run_id := NULL;
            RETURN NEXT;
            CONTINUE;
        END IF;
        -- The run that has the id may end in this very moment: then there is room for the new one.
        FOR v_try IN 1 .. 5 LOOP
            SELECT * INTO v_new FROM {schema}.create_run(
                p_runs[i], p_workflow_ids[i], p_streams[i], p_names[i], p_inputs[i], p_conflicts[i], p_reuses[i], p_delays[i],
                p_options[i]::json, NULL, NULL, NULL, CASE WHEN NOT v_caller.is_admin THEN v_caller.principal_id END);
            status := v_new.status;
            run_id := v_new.run_id;
            EXIT WHEN status <> 'started' AND (status <> 'exists' OR p_conflicts[i] <> 'use_existing');
            SELECT r.* INTO v_run FROM {schema}.run r WHERE r.run_id = v_new.run_id;
            v_run := {schema}.lock_live(v_run);
            run_id := v_run.run_id;
            IF p_with_types[i] = 'UpdateRequested' THEN
                v_posted := {schema}.request_update(
                    v_run, p_with_keys[i], p_with_names[i], p_with_payloads[i], p_with_traces[i]);
            ELSE
                v_posted := {schema}.post_one(
                    v_run, p_with_types[i], p_with_keys[i], p_with_names[i], p_with_payloads[i], p_with_traces[i]);
            END IF;
            IF v_posted = 'ok' THEN
                v_told := v_told || v_run.run_id;
            END IF;
            EXIT WHEN v_posted <> 'closed';
            status := 'closed';
        END LOOP;
        RETURN NEXT;
    END LOOP;
    PERFORM {schema}.add_tasks(v_told, p_sender IS NULL);
    PERFORM {schema}.wake(v_may, p_sender IS NULL);
END
$$;

-- Internal: a step of p_run sends another run (or itself) a signal or a cancel (p_type: SignalSent, CancelSent): the live one that has the workflow id, or
-- (child) the one behind the command that started a child.  What became of it is news for p_run: MessageDelivered, or
-- MessageFailed with the reason closed or missing.  Foreign and missing look the same: a workflow id is looked up with the
-- rights of the login whose worker takes the step.
CREATE FUNCTION {schema}.send_to_run(
    p_run uuid, p_type text, p_seq int, p_name text, p_payload bytea, p_attributes json)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_child int := (p_attributes ->> 'child')::int;
    v_to uuid;
    v_next uuid;
    v_status text;
    v_reason text;
    v_run {schema}.run;
BEGIN
    FOR v_try IN 1 .. 5 LOOP
        IF v_child IS NULL THEN
            v_run := {schema}.live_run({schema}.find_run(NULL, p_attributes ->> 'workflow_id', 'e'));
            v_to := v_run.run_id;
        ELSE
            v_to := {schema}.child_run(p_run, v_child);
            IF v_to IS NULL THEN
                SELECT r.run_id INTO v_to FROM {schema}.run r
                WHERE r.parent_run_id = p_run AND r.parent_seq = v_child ORDER BY r.started_at DESC LIMIT 1;
            END IF;
            IF v_to IS NULL THEN
                SELECT f.run_id INTO v_to FROM {schema}.follower f WHERE f.follower_run_id = p_run AND f.seq = v_child;
            END IF;
        END IF;
        v_next := NULL;
        -- Whoever is closing the other run holds it for a moment: this step then comes again, and waits for nobody.
        SELECT r.status, r.next_run_id INTO v_status, v_next FROM {schema}.run r WHERE r.run_id = v_to FOR KEY SHARE NOWAIT;
        -- It may have gone on as another one since it was looked up.
        EXIT WHEN v_status = 'running' OR v_next IS NULL;
    END LOOP;
    IF v_status IS NULL THEN
        v_reason := 'missing';
    ELSIF v_status <> 'running' THEN
        v_reason := 'closed';
    ELSE
        INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
        VALUES (v_to, CASE p_type WHEN 'SignalSent' THEN 'SignalReceived' ELSE 'CancelRequested' END, p_name, p_payload,
                {schema}.trace_of(p_attributes -> 'trace' ->> 'traceparent'));
    END IF;
    -- One that has closed with this step needs no news.
    INSERT INTO {schema}.inbox (run_id, type, seq, name, attributes)
    SELECT p_run, CASE WHEN v_reason IS NULL THEN 'MessageDelivered' ELSE 'MessageFailed' END, p_seq, p_name,
           json_strip_nulls(json_build_object('reason', v_reason))
    FROM {schema}.run r WHERE r.run_id = p_run AND r.status = 'running';
    PERFORM {schema}.add_tasks(ARRAY(SELECT DISTINCT t FROM unnest(ARRAY[p_run] || CASE WHEN v_reason IS NULL THEN v_to END) t));
END
$$;
