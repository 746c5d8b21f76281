-- How a run ends that its code does not end: terminated, or with its parent; and who is told of it.

-- End a run from outside without a word to its code.  Answers ok, closed or missing.
CREATE FUNCTION {schema}.terminate_run(p_sender uuid, p_batch bigint, p_run uuid, p_workflow_id text, p_reason text)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_run {schema}.run;
BEGIN
    PERFORM {schema}.begin_batch(p_sender, p_batch, 1);
    v_run := {schema}.find_run(p_run, p_workflow_id, 'r');
    IF v_run.run_id IS NULL THEN
        RETURN 'missing';
    END IF;
    -- As for signals: the run that goes on for this one, also where it does so in this very moment.
    FOR v_try IN 1 .. 5 LOOP
        v_run := {schema}.live_run(v_run);
        IF {schema}.end_run(v_run.run_id, 'terminated', 'WorkflowTerminated', p_reason) = 'ok' THEN
            RETURN 'ok';
        END IF;
        SELECT r.* INTO v_run FROM {schema}.run r WHERE r.run_id = v_run.run_id;
        EXIT WHEN v_run.next_run_id IS NULL;
    END LOOP;
    RETURN 'closed';
END
$$;

-- Internal: close a run with one event of the database's own.  Answers ok or closed.
CREATE FUNCTION {schema}.end_run(p_run uuid, p_status text, p_event text, p_reason text)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run {schema}.run;
BEGIN
    SELECT * INTO v_run FROM {schema}.run r WHERE r.run_id = p_run AND r.status = 'running' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 'closed';
    END IF;
    UPDATE {schema}.run r
    SET status = p_status, closed_at = clock_timestamp(), last_event = v_run.last_event + 1, task_failure = NULL
    WHERE r.run_id = p_run;
    INSERT INTO {schema}.event (run_id, event_id, type, at, attributes)
    VALUES (p_run, v_run.last_event + 1, p_event, date_trunc('milliseconds', clock_timestamp()), json_build_object('reason', p_reason));
    PERFORM {schema}.after_close(p_run);
    DELETE FROM {schema}.follower f WHERE f.follower_run_id = p_run;
    IF p_status = 'terminated' THEN
        -- No worker knows of it: where it is in a trace, its deadline comes now, and who claims that writes its last span.
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, actor, payload)
        SELECT {schema}.derived_id(p_run, 'deadline'), v_run.stream_id, -1, clock_timestamp(), clock_timestamp(), 'e', p_run,
               v_run.name, ''
        FROM {schema}.event e
        WHERE e.run_id = p_run AND e.event_id = 1 AND {schema}.readable(e.attributes) -> 'trace' IS NOT NULL
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            PERFORM {schema}.wake(ARRAY[v_run.stream_id]);
        END IF;
    END IF;
    RETURN 'ok';
END
$$;

-- Internal: lock a run, and the children that end with it, without waiting for anybody.  Answers whether all are locked.
CREATE FUNCTION {schema}.lock_tree(p_run uuid)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_child uuid;
BEGIN
    PERFORM 1 FROM {schema}.run r WHERE r.run_id = p_run FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    FOR v_child IN
        SELECT r.run_id FROM {schema}.run r
        WHERE r.parent_run_id = p_run AND r.status = 'running' AND r.parent_close = 'terminate'
        ORDER BY r.parent_seq
    LOOP
        IF NOT {schema}.lock_tree(v_child) THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
END
$$;

-- Internal: what follows from the end of a run.  Its last event is the closing one.
-- Its queued work is dropped, its children are treated as their parent_close says, another run goes on for it or else its
-- parent and its followers get the outcome, and whoever waits for it is notified.  Whom it follows itself is the caller's to
-- forget: its last step may have something to say to them.
CREATE FUNCTION {schema}.after_close(p_run uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_run {schema}.run;
    v_child {schema}.run;
    v_follower record;
    v_channel uuid;
    v_left uuid[];
    v_workers bigint[];
BEGIN
    SELECT * INTO v_run FROM {schema}.run r WHERE r.run_id = p_run;
    -- Leased messages, and those that are being leased, are left to their workers, whose completions find the run closed;
    -- whoever runs one of its activities is told.
    SELECT array_agg(q.message_id) FILTER (WHERE q.lease_token IS NULL),
           array_agg(DISTINCT q.worker_id) FILTER (WHERE q.lease_token IS NOT NULL AND q.kind = 'a')
    INTO v_left, v_workers
    FROM (SELECT p_run AS id
          UNION ALL
          SELECT {schema}.derived_id(p_run, 'deadline')
          UNION ALL
          SELECT overlay(md5(p_run::text || ':' || e.seq) PLACING '8' FROM 13)::uuid
          FROM {schema}.event e WHERE e.run_id = p_run AND e.type IN ('ActivityScheduled', 'TimerStarted')) d
    JOIN {schema}.message q ON q.message_id = d.id
    WHERE q.run_id = p_run;
    IF v_left IS NOT NULL THEN
        DELETE FROM {schema}.message m
        USING (SELECT q.message_id, q.stream_id FROM {schema}.message q
               WHERE q.message_id = ANY (v_left) AND q.run_id = p_run AND q.lease_token IS NULL FOR UPDATE SKIP LOCKED) t
        WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
    END IF;
    IF v_workers IS NOT NULL THEN
        PERFORM {schema}.tell_workers(v_workers);
    END IF;
    IF EXISTS (SELECT 1 FROM {schema}.activity a WHERE a.run_id = p_run)
       OR EXISTS (SELECT 1 FROM {schema}.activity_cancel c WHERE c.run_id = p_run) THEN
        PERFORM {schema}.forget_activities(p_run);
    END IF;
    FOR v_child IN
        SELECT r.* FROM {schema}.run r
        WHERE r.parent_run_id = p_run AND r.status = 'running' AND r.parent_close <> 'abandon' ORDER BY r.parent_seq
    LOOP
        IF v_child.parent_close = 'terminate' THEN
            PERFORM {schema}.end_run(v_child.run_id, 'terminated', 'WorkflowTerminated', 'its parent closed');
        ELSE
            PERFORM {schema}.add_tasks(ARRAY[
                {schema}.tell_child(p_run, v_child.parent_seq, 'CancelRequested', NULL, NULL, NULL)]);
        END IF;
    END LOOP;
    IF v_run.next_run_id IS NULL AND {schema}.go_on(v_run) IS NULL THEN
        IF v_run.parent_run_id IS NOT NULL THEN
            PERFORM {schema}.tell_parent(v_run.parent_run_id, v_run.parent_seq, v_run);
        END IF;
        FOR v_follower IN
            DELETE FROM {schema}.follower f WHERE f.run_id = p_run RETURNING f.follower_run_id, f.seq
        LOOP
            PERFORM {schema}.tell_parent(v_follower.follower_run_id, v_follower.seq, v_run);
        END LOOP;
    END IF;
    PERFORM {schema}.cancel_escalations(p_run);
    DELETE FROM {schema}.inbox i WHERE i.run_id = p_run;
    PERFORM {schema}.tell_update(coalesce(v_run.first_run_id, p_run), NULL, false);
    FOR v_channel IN DELETE FROM {schema}.waiter w WHERE w.run_id = p_run RETURNING w.channel LOOP
        -- As everywhere: a full notification queue fails nothing; who waits looks from time to time.
        IF pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('durable:c' || v_channel, '');
        END IF;
    END LOOP;
END
$$;

-- Internal: a run has closed: the run that started it (its command p_seq), or follows it, gets the outcome.
CREATE FUNCTION {schema}.tell_parent(p_parent uuid, p_seq int, p_child {schema}.run)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    INSERT INTO {schema}.inbox (run_id, type, seq, name, payload, attributes)
    SELECT p_parent,
           CASE p_child.status WHEN 'completed' THEN 'ChildCompleted' WHEN 'failed' THEN 'ChildFailed'
                WHEN 'cancelled' THEN 'ChildCancelled' WHEN 'timed_out' THEN 'ChildTimedOut' ELSE 'ChildTerminated' END,
           p_seq, p_child.name, e.payload, e.attributes
    FROM {schema}.event e
    WHERE e.run_id = p_child.run_id AND e.event_id = p_child.last_event
      -- A parent that has closed already needs no news; one that is being made by a reset is not there yet.
      AND NOT EXISTS (SELECT 1 FROM {schema}.run r WHERE r.run_id = p_parent AND r.status <> 'running');
    PERFORM {schema}.add_tasks(ARRAY[p_parent]);
END
$$;
