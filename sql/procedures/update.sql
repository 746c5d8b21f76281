-- Updates: asked for from outside, validated and answered by a run's code.
--
-- A request lies in the run's inbox as UpdateRequested, and its row in run_update remembers it by its id.  What the code
-- makes of it comes with a step: UpdateAccepted and UpdateCompleted are events, a rejection is none.

-- Internal: put an update into the inbox of a run, which the caller has locked with lock_live().  p_trace: as for post().
-- Answers ok; duplicate (this id came before, to any run of its chain); closed.
CREATE FUNCTION {schema}.request_update(p_run {schema}.run, p_id text, p_name text, p_payload bytea,
                                         p_trace text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_chain uuid := coalesce(p_run.first_run_id, p_run.run_id);
BEGIN
    IF p_run.status <> 'running' THEN
        RETURN CASE WHEN EXISTS (SELECT 1 FROM {schema}.run_update u WHERE u.chain_id = v_chain AND u.update_id = p_id)
               THEN 'duplicate' ELSE 'closed' END;
    END IF;
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('run_update', 1, v_chain);
    END IF;
    INSERT INTO {schema}.run_update (chain_id, run_id, update_id, name) VALUES (v_chain, p_run.run_id, p_id, p_name)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN 'duplicate';
    END IF;
    INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
    VALUES (p_run.run_id, 'UpdateRequested', p_name, p_payload,
            {schema}.with_fact({schema}.trace_of(p_trace), 'update_id', to_json(p_id)));
    RETURN 'ok';
END
$$;

-- Ask runs for updates.  p_traces: as for post().  Answers per position (ok; duplicate: this id came before; closed; missing) and the run that has it.
CREATE FUNCTION {schema}.request_updates(
    p_sender uuid, p_batch bigint, p_runs uuid[], p_workflow_ids text[], p_ids text[], p_names text[], p_payloads bytea[],
    p_traces text[] DEFAULT NULL)
RETURNS TABLE (status text, run_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
#variable_conflict use_column
DECLARE
    v_run {schema}.run;
    v_told uuid[] := '{}';
    i int;
BEGIN
    PERFORM {schema}.caller();
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('inbox', cardinality(p_ids));
        PERFORM {schema}.check_room('message', cardinality(p_ids));
    END IF;
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_ids));
    FOR i IN 1 .. cardinality(p_ids) LOOP
        v_run := {schema}.lock_live({schema}.find_run(p_runs[i], p_workflow_ids[i], 'e'));
        run_id := v_run.run_id;
        status := CASE WHEN v_run.run_id IS NULL THEN 'missing'
                  ELSE {schema}.request_update(v_run, p_ids[i], p_names[i], p_payloads[i], p_traces[i]) END;
        IF status = 'ok' AND NOT v_run.run_id = ANY (v_told) THEN
            v_told := v_told || v_run.run_id;
        END IF;
        RETURN NEXT;
    END LOOP;
    PERFORM {schema}.add_tasks(v_told, p_sender IS NULL);
END
$$;

-- How updates stand, by position: requested, accepted, completed (with its result or failure), rejected (with its
-- failure), closed (the run ended first), missing.  A channel is notified of changes for p_wait milliseconds.
CREATE FUNCTION {schema}.get_updates(
    p_runs uuid[], p_workflow_ids text[], p_ids text[], p_channel uuid, p_wait int)
RETURNS TABLE (n int, status text, payload bytea, failure text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
#variable_conflict use_column
DECLARE
    v_run {schema}.run;
    v_chain uuid;
    v_update record;
    i int;
BEGIN
    PERFORM {schema}.caller();
    FOR i IN 1 .. least(cardinality(p_ids), 10000) LOOP
        n := i;
        payload := NULL;
        failure := NULL;
        -- Updates that are asked about together are mostly those of one run.
        IF i = 1 OR (p_runs[i], p_workflow_ids[i]) IS DISTINCT FROM (p_runs[i - 1], p_workflow_ids[i - 1]) THEN
            v_run := {schema}.find_run(p_runs[i], p_workflow_ids[i], 'e');
            v_chain := coalesce(v_run.first_run_id, v_run.run_id);
        END IF;
        IF v_chain IS NULL OR p_ids[i] IS NULL THEN
            status := 'missing';
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF p_channel IS NOT NULL AND EXISTS (
            SELECT 1 FROM {schema}.run_update u
            WHERE u.chain_id = v_chain AND u.update_id = p_ids[i] AND u.status IN ('requested', 'accepted'))
           -- Whoever waits too often is not told, and finds out by looking.
           AND (NOT starts_with(session_user, 'dd_') OR {schema}.has_room(session_user, 'update_waiter', 1)) THEN
            INSERT INTO {schema}.update_waiter (chain_id, update_id, channel, until)
            VALUES (v_chain, p_ids[i], p_channel,
                    clock_timestamp() + least(greatest(p_wait, 0), 3600000) * interval '1 millisecond')
            ON CONFLICT (chain_id, update_id, channel) DO UPDATE SET until = excluded.until;
        END IF;
        -- In one look, and after the wish can be seen: a run that goes on as another takes its updates along.
        SELECT u.*, r.status = 'running' AS live INTO v_update
        FROM {schema}.run_update u LEFT JOIN {schema}.run r ON r.run_id = u.run_id
        WHERE u.chain_id = v_chain AND u.update_id = p_ids[i];
        failure := v_update.failure::text;
        status := CASE WHEN v_update.chain_id IS NULL THEN 'missing'
                  WHEN v_update.status IN ('requested', 'accepted') AND v_update.live IS NOT TRUE THEN 'closed'
                  ELSE v_update.status END;
        IF v_update.status = 'completed' THEN
            SELECT e.payload, (e.attributes -> 'failure')::text INTO payload, failure
            FROM {schema}.event e WHERE e.run_id = v_update.run_id AND e.event_id = v_update.event_id;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Internal: what a step of a run says of an update: UpdateAccepted, UpdateCompleted or UpdateRejected.
CREATE FUNCTION {schema}.note_update(p_run uuid, p_event int, p_type text, p_attributes json)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_chain uuid := (SELECT coalesce(r.first_run_id, r.run_id) FROM {schema}.run r WHERE r.run_id = p_run);
BEGIN
    UPDATE {schema}.run_update u
    SET status = CASE p_type WHEN 'UpdateAccepted' THEN 'accepted' WHEN 'UpdateCompleted' THEN 'completed' ELSE 'rejected' END,
        event_id = CASE p_type WHEN 'UpdateCompleted' THEN p_event END,
        failure = CASE p_type WHEN 'UpdateRejected' THEN p_attributes -> 'failure' END
    WHERE u.chain_id = v_chain AND u.update_id = p_attributes ->> 'update_id' AND u.run_id = p_run
      -- The first answer counts: a run that was reset may come to another.
      AND u.status IN ('requested', 'accepted');
    PERFORM {schema}.tell_update(v_chain, p_attributes ->> 'update_id', p_type <> 'UpdateAccepted');
END
$$;

-- Internal: a run goes on for another: so it does with the updates that have no answer.  p_all: those that were accepted,
-- too, because it has their history; else only those that are in its inbox: it is asked anew.
CREATE FUNCTION {schema}.hand_over_updates(p_from uuid, p_to uuid, p_all boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    UPDATE {schema}.run_update u SET run_id = p_to, status = CASE WHEN p_all THEN u.status ELSE 'requested' END
    WHERE u.run_id = p_from AND u.status IN ('requested', 'accepted') AND (
        p_all AND u.status = 'accepted'
        -- What was dropped when a run ended is nobody's.
        OR EXISTS (
            SELECT 1 FROM {schema}.inbox i
            WHERE i.run_id = p_to AND i.type = 'UpdateRequested' AND i.attributes ->> 'update_id' = u.update_id));
END
$$;

-- Internal: notify who waits for an update, or (p_id NULL) for any of a chain of runs.  p_last: there is nothing more to wait for.
CREATE FUNCTION {schema}.tell_update(p_chain uuid, p_id text, p_last boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_channel uuid;
BEGIN
    FOR v_channel IN
        SELECT DISTINCT w.channel FROM {schema}.update_waiter w
        WHERE w.chain_id = p_chain AND (p_id IS NULL OR w.update_id = p_id)
    LOOP
        -- As everywhere: a full notification queue fails nothing; who waits looks from time to time.
        IF pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('durable:c' || v_channel, '');
        END IF;
    END LOOP;
    IF FOUND AND p_last THEN
        -- What its waiter renews in this moment is left to the sweep: nobody waits for it.
        DELETE FROM {schema}.update_waiter w WHERE w.ctid = ANY (ARRAY(
            SELECT o.ctid FROM {schema}.update_waiter o
            WHERE o.chain_id = p_chain AND (p_id IS NULL OR o.update_id = p_id) FOR UPDATE SKIP LOCKED));
    END IF;
END
$$;
