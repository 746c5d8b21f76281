-- Updates: asked for from outside, validated and answered by a run's code.
--
-- A request lies in the run's inbox as UpdateRequested, and its row in run_update remembers it by its id.  What the code
-- makes of it comes with a step: UpdateAccepted and UpdateCompleted are events, a rejection is none.

-- Internal: the run that a message is meant for: as find_run(), and where that run has continued as new, the run that
-- goes on with its work.
CREATE FUNCTION {schema}.reach_run(p_run uuid, p_workflow_id text)
RETURNS {schema}.run
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run {schema}.run := {schema}.find_run(p_run, p_workflow_id);
    v_next {schema}.run;
BEGIN
    IF v_run.status = 'continued_as_new' THEN
        SELECT r.* INTO v_next FROM {schema}.run r
        WHERE r.workflow_id = v_run.workflow_id AND r.stream_id = v_run.stream_id
        ORDER BY (r.status = 'running') DESC, r.started_at DESC LIMIT 1;
        RETURN v_next;
    END IF;
    RETURN v_run;
END
$$;

-- Internal: put an update into the inbox of a run, whose row the caller holds with a key-share lock.
-- Answers ok; duplicate (this id came before); closed.
CREATE FUNCTION {schema}.request_update(p_run uuid, p_status text, p_id text, p_name text, p_payload bytea)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_status <> 'running' THEN
        RETURN CASE WHEN EXISTS (SELECT 1 FROM {schema}.run_update u WHERE u.run_id = p_run AND u.update_id = p_id)
               THEN 'duplicate' ELSE 'closed' END;
    END IF;
    INSERT INTO {schema}.run_update (run_id, update_id, name) VALUES (p_run, p_id, p_name) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN 'duplicate';
    END IF;
    INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
    VALUES (p_run, 'UpdateRequested', p_name, p_payload, json_build_object('update_id', p_id));
    RETURN 'ok';
END
$$;

-- Ask runs for updates.  Answers per position (ok; duplicate: this id came before; closed; missing) and the run that has it.
CREATE FUNCTION {schema}.request_updates(
    p_sender uuid, p_batch bigint, p_runs uuid[], p_workflow_ids text[], p_ids text[], p_names text[], p_payloads bytea[])
RETURNS TABLE (status text, run_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
#variable_conflict use_column
DECLARE
    v_run {schema}.run;
    v_status text;
    v_told uuid[] := '{}';
    i int;
BEGIN
    PERFORM {schema}.caller();
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_ids));
    FOR i IN 1 .. cardinality(p_ids) LOOP
        v_run := {schema}.find_run(p_runs[i], p_workflow_ids[i]);
        IF v_run.status = 'continued_as_new' AND NOT EXISTS (
            SELECT 1 FROM {schema}.run_update u WHERE u.run_id = v_run.run_id AND u.update_id = p_ids[i]) THEN
            v_run := {schema}.reach_run(v_run.run_id, NULL);
        END IF;
        run_id := v_run.run_id;
        v_status := NULL;
        -- It does not hinder the run's steps; while it is held the run does not close.
        SELECT r.status INTO v_status FROM {schema}.run r WHERE r.run_id = v_run.run_id FOR KEY SHARE;
        status := CASE WHEN v_status IS NULL THEN 'missing'
                  ELSE {schema}.request_update(v_run.run_id, v_status, p_ids[i], p_names[i], p_payloads[i]) END;
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
    v_update {schema}.run_update;
    i int;
BEGIN
    PERFORM {schema}.caller();
    FOR i IN 1 .. least(cardinality(p_ids), 10000) LOOP
        v_run := {schema}.find_run(p_runs[i], p_workflow_ids[i]);
        SELECT u.* INTO v_update FROM {schema}.run_update u WHERE u.run_id = v_run.run_id AND u.update_id = p_ids[i];
        IF NOT FOUND AND v_run.status = 'continued_as_new' THEN
            v_run := {schema}.reach_run(v_run.run_id, NULL);
            SELECT u.* INTO v_update FROM {schema}.run_update u WHERE u.run_id = v_run.run_id AND u.update_id = p_ids[i];
        END IF;
        IF v_update.status IN ('requested', 'accepted') AND v_run.status = 'running' AND p_channel IS NOT NULL THEN
            INSERT INTO {schema}.update_waiter (run_id, update_id, channel, until)
            VALUES (v_run.run_id, p_ids[i], p_channel,
                    clock_timestamp() + least(greatest(p_wait, 0), 3600000) * interval '1 millisecond')
            ON CONFLICT (run_id, update_id, channel) DO UPDATE SET until = excluded.until;
            -- What was decided before the wish could be seen is seen by this look.
            SELECT u.* INTO v_update FROM {schema}.run_update u WHERE u.run_id = v_run.run_id AND u.update_id = p_ids[i];
        END IF;
        n := i;
        payload := NULL;
        failure := v_update.failure::text;
        status := CASE WHEN v_update.run_id IS NULL THEN 'missing'
                  WHEN v_update.status IN ('requested', 'accepted') AND v_run.status <> 'running' THEN 'closed'
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
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    UPDATE {schema}.run_update u
    SET status = CASE p_type WHEN 'UpdateAccepted' THEN 'accepted' WHEN 'UpdateCompleted' THEN 'completed' ELSE 'rejected' END,
        event_id = CASE p_type WHEN 'UpdateCompleted' THEN p_event END,
        failure = CASE p_type WHEN 'UpdateRejected' THEN p_attributes -> 'failure' END
    WHERE u.run_id = p_run AND u.update_id = p_attributes ->> 'update_id' AND u.status IN ('requested', 'accepted');
    PERFORM {schema}.tell_update(p_run, p_attributes ->> 'update_id', p_type <> 'UpdateAccepted');
END
$$;

-- Internal: notify who waits for an update, or (p_id NULL) for any of a run's.  p_last: there is nothing more to wait for.
CREATE FUNCTION {schema}.tell_update(p_run uuid, p_id text, p_last boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_channel uuid;
BEGIN
    FOR v_channel IN
        SELECT DISTINCT w.channel FROM {schema}.update_waiter w
        WHERE w.run_id = p_run AND (p_id IS NULL OR w.update_id = p_id)
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
            WHERE o.run_id = p_run AND (p_id IS NULL OR o.update_id = p_id) FOR UPDATE SKIP LOCKED));
    END IF;
END
$$;
