-- Reset: a run is taken up again at an earlier event, as a new run.

-- Begin a new run (p_new) with the history of a run up to an event; the step of that event is taken again, and what was
-- pending then is done again.  Whoever has the workflow id ends: terminated, for the reason "reset".
-- Answers ok; missing; invalid (there is no such event: p_last tells how many the run has); busy (try again).
--
-- p_inputs: the types of events that are applied to a run; a step begins with one of them.  The last of them up to the
-- event is not copied: it is news for the new run, which the code may answer in another way than before.
--   - Signals and updates that came later come again, in order, also those that the runs took that went on for this one; an
--     update that was answered keeps its answer.
--   - Children that were started up to the event stay, and tell the new run how they end, or ended; but those that ended
--     because the old run did are started again.  Later children end as their parent_close says.
--   - Timers that were running keep their due times: the news WorkflowReset names them.
--   - What was said to other runs has been said; what was asked of people is asked again.
CREATE FUNCTION {schema}.reset_run(
    p_sender uuid, p_batch bigint, p_run uuid, p_workflow_id text, p_event int, p_new uuid, p_inputs text[],
    OUT status text, OUT last int)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_run {schema}.run;
    v_other {schema}.run;
    v_child {schema}.run;
    v_first {schema}.event;
    v_new record;
    v_cut int;
    v_timers json;
    v_facts json;
BEGIN
    PERFORM {schema}.begin_batch(p_sender, p_batch, 1);
    v_run := {schema}.find_run(p_run, p_workflow_id, 'r');
    IF v_run.run_id IS NULL OR (substr(p_new::text, 15, 1) IS DISTINCT FROM '8') IS NOT TRUE THEN
        reset_run.status := 'missing';
        RETURN;
    END IF;
    IF EXISTS (SELECT 1 FROM {schema}.run r WHERE r.run_id = p_new) THEN
        -- Only repeated, because its answer was lost; or somebody else's, which is not told.
        reset_run.status := CASE WHEN EXISTS (
            SELECT 1 FROM {schema}.run r WHERE r.run_id = p_new AND r.workflow_id = v_run.workflow_id
            AND r.stream_id = v_run.stream_id) THEN 'ok' ELSE 'missing' END;
        RETURN;
    END IF;
    SELECT r.* INTO v_run FROM {schema}.run r WHERE r.run_id = v_run.run_id FOR UPDATE;
    reset_run.last := v_run.last_event;
    SELECT max(e.event_id) INTO v_cut FROM {schema}.event e
    WHERE e.run_id = v_run.run_id AND e.event_id <= p_event AND e.type = ANY (p_inputs);
    IF (p_event BETWEEN 1 AND v_run.last_event AND v_cut IS NOT NULL) IS NOT TRUE THEN
        reset_run.status := 'invalid';
        RETURN;
    END IF;
    SELECT e.* INTO v_first FROM {schema}.event e WHERE e.run_id = v_run.run_id AND e.event_id = 1;

    -- The children that stay.
    FOR v_child IN
        SELECT r.* FROM {schema}.event e
        JOIN {schema}.run r ON r.parent_run_id = e.run_id AND r.parent_seq = e.seq
        WHERE e.run_id = v_run.run_id AND e.type = 'ChildStarted' AND e.event_id <= p_event AND r.next_run_id IS NULL
        ORDER BY e.event_id
        FOR UPDATE OF r
    LOOP
        CONTINUE WHEN v_child.status IN ('terminated', 'cancelled') AND v_child.closed_at >= v_run.closed_at;
        CONTINUE WHEN EXISTS (
            SELECT 1 FROM {schema}.event e
            WHERE e.run_id = v_run.run_id AND e.event_id <= v_cut AND e.seq = v_child.parent_seq AND e.type = ANY (p_inputs)
              AND e.type LIKE 'Child%');
        UPDATE {schema}.run r SET parent_run_id = p_new WHERE r.run_id = v_child.run_id;
        IF v_child.status <> 'running' THEN
            PERFORM {schema}.tell_parent(p_new, v_child.parent_seq, v_child);
        END IF;
    END LOOP;
    UPDATE {schema}.follower f SET follower_run_id = p_new
    WHERE f.follower_run_id = v_run.run_id AND EXISTS (
        SELECT 1 FROM {schema}.event e
        WHERE e.run_id = v_run.run_id AND e.type = 'ChildStarted' AND e.event_id <= p_event AND e.seq = f.seq);

    -- The signals that came later; what is news for the new run stands before them.
    IF v_cut > 1 THEN
        -- What runs out later is no concern of a timer that was answered or cancelled by then.
        SELECT json_object_agg(t.seq, (extract(epoch FROM t.at) * 1000)::bigint + coalesce((t.attributes ->> 'ms')::bigint, 0))
        INTO v_timers
        FROM {schema}.event t
        WHERE t.run_id = v_run.run_id AND t.type IN ('TimerStarted', 'EscalationOpened') AND t.event_id <= p_event
          AND NOT EXISTS (SELECT 1 FROM {schema}.event e WHERE e.run_id = v_run.run_id AND e.event_id < v_cut AND e.seq = t.seq
                          AND e.type IN ('TimerFired', 'TimerCancelled'));
        INSERT INTO {schema}.inbox (run_id, type, attributes)
        VALUES (p_new, 'WorkflowReset', json_build_object(
            'run_id', p_new, 'previous', v_run.run_id, 'event', p_event, 'timers', coalesce(v_timers, '{}'::json)));
        INSERT INTO {schema}.inbox (run_id, type, at, seq, name, payload, attributes)
        SELECT p_new, CASE e.type WHEN 'UpdateAccepted' THEN 'UpdateRequested' ELSE e.type END, clock_timestamp(), e.seq,
               e.name, e.payload, e.attributes
        FROM {schema}.event e WHERE e.run_id = v_run.run_id AND e.event_id = v_cut;
        -- What was answered in the very moment in which it was asked, and how runs ended that others had started.
        INSERT INTO {schema}.inbox (run_id, type, seq, name, payload, attributes)
        SELECT p_new, a.type, a.seq, a.name, a.payload, a.attributes
        FROM (SELECT e.type, e.seq, e.name, e.payload, e.attributes, e.event_id AS n FROM {schema}.event e
              WHERE e.run_id = v_run.run_id AND e.event_id > v_cut
              UNION ALL
              SELECT i.type, i.seq, i.name, i.payload, i.attributes, v_run.last_event + i.inbox_id FROM {schema}.inbox i
              WHERE i.run_id = v_run.run_id) a
        WHERE EXISTS (
            SELECT 1 FROM {schema}.event e
            WHERE e.run_id = v_run.run_id AND e.event_id < v_cut AND e.seq = a.seq
              AND CASE WHEN a.type IN ('MessageDelivered', 'MessageFailed') THEN e.type IN ('SignalSent', 'CancelSent')
                       WHEN a.type = 'ChildStartConfirmed' THEN e.type = 'ChildStartAwaited'
                       WHEN a.type IN ('ChildCompleted', 'ChildFailed', 'ChildCancelled', 'ChildTerminated', 'ChildTimedOut')
                       THEN e.type = 'ChildStarted' AND NOT EXISTS (
                           SELECT 1 FROM {schema}.run r
                           WHERE r.parent_run_id IN (v_run.run_id, p_new) AND r.parent_seq = a.seq)
                       ELSE false END)
        ORDER BY a.n;
        -- An answer that the old run did not live to be given.
        INSERT INTO {schema}.inbox (run_id, type, seq, name, attributes)
        SELECT p_new, CASE e.type WHEN 'ChildStartAwaited' THEN 'ChildStartConfirmed' ELSE 'MessageDelivered' END, e.seq, e.name,
               CASE e.type WHEN 'ChildStartAwaited' THEN json_build_object(
                   'child', e.attributes -> 'child', 'run_id', {schema}.derived_id(p_new, e.attributes ->> 'child')) END
        FROM {schema}.event e
        WHERE e.run_id = v_run.run_id AND e.event_id < v_cut AND e.type IN ('SignalSent', 'CancelSent', 'ChildStartAwaited')
          AND NOT EXISTS (SELECT 1 FROM {schema}.inbox i WHERE i.run_id = p_new AND i.seq = e.seq)
          AND NOT EXISTS (SELECT 1 FROM {schema}.event a WHERE a.run_id = v_run.run_id AND a.event_id <= v_cut AND a.seq = e.seq
                          AND a.type = ANY (p_inputs));
    END IF;
    INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
    SELECT p_new, CASE e.type WHEN 'UpdateAccepted' THEN 'UpdateRequested' ELSE e.type END, e.name, e.payload,
           CASE e.type WHEN 'UpdateAccepted' THEN e.attributes END
    FROM {schema}.event e
    WHERE e.run_id = v_run.run_id AND e.event_id > v_cut AND e.type IN ('SignalReceived', 'UpdateAccepted')
    ORDER BY e.event_id;
    INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
    SELECT p_new, i.type, i.name, i.payload, i.attributes FROM {schema}.inbox i
    WHERE i.run_id = v_run.run_id AND i.type IN ('SignalReceived', 'UpdateRequested') ORDER BY i.inbox_id;
    PERFORM {schema}.hand_over_updates(v_run.run_id, p_new, true);
    PERFORM {schema}.hand_back(v_run, p_new);

    -- What people were asked, and had not answered.
    INSERT INTO {schema}.escalation (
        escalation_id, run_id, seq, stream_id, role, type, subject, priority, payload, metadata, opened_at, times_out_at)
    SELECT {schema}.derived_id(p_new, o.seq::text), p_new, o.seq, o.stream_id, o.role, o.type, o.subject, o.priority, o.payload,
           o.metadata, o.opened_at, o.times_out_at
    FROM {schema}.escalation o
    WHERE o.run_id = v_run.run_id AND EXISTS (
        SELECT 1 FROM {schema}.event e
        WHERE e.run_id = v_run.run_id AND e.event_id < v_cut AND e.seq = o.seq AND e.type = 'EscalationOpened')
      AND NOT EXISTS (
        SELECT 1 FROM {schema}.event e
        WHERE e.run_id = v_run.run_id AND e.event_id <= v_cut AND e.seq = o.seq
          AND e.type IN ('EscalationResolved', 'EscalationCancelled', 'EscalationTimedOut', 'EscalationWithdrawn'));

    -- Whoever has the workflow id ends; who waited for a run of this chain waits for the new one.
    SELECT r.* INTO v_other FROM {schema}.run r
    WHERE r.workflow_id = v_run.workflow_id AND r.stream_id = v_run.stream_id AND r.status = 'running';
    IF FOUND THEN
        IF coalesce(v_other.first_run_id, v_other.run_id) = coalesce(v_run.first_run_id, v_run.run_id) THEN
            UPDATE {schema}.run r SET next_run_id = p_new WHERE r.run_id = v_other.run_id;
            UPDATE {schema}.follower f SET run_id = p_new WHERE f.run_id = v_other.run_id;
        END IF;
        PERFORM {schema}.end_run(v_other.run_id, 'terminated', 'WorkflowTerminated', 'reset');
    END IF;

    v_facts := CASE
        WHEN v_cut = 1 THEN {schema}.with_fact(
            {schema}.with_fact(v_first.attributes, 'origin', NULL), 'previous', to_json(v_run.run_id::text))
        WHEN v_first.attributes -> 'origin' IS NOT NULL THEN v_first.attributes
        ELSE {schema}.with_fact(v_first.attributes, 'origin', json_build_object(
            'run_id', v_run.run_id, 'started_at', (extract(epoch FROM v_run.started_at) * 1000)::bigint)) END;
    v_facts := {schema}.with_first(v_facts, v_run);
    SELECT * INTO v_new FROM {schema}.create_run(
        p_new, v_run.workflow_id, v_run.stream_id, v_run.name, v_first.payload, 'fail', 'allow', 0, v_facts,
        v_run.parent_run_id, v_run.parent_seq, v_run.parent_close, v_run.principal_id);
    IF v_new.status <> 'started' THEN
        RAISE EXCEPTION 'the workflow id is being fought over' USING ERRCODE = '55P03';
    END IF;
    UPDATE {schema}.run r
    SET first_run_id = coalesce(v_run.first_run_id, v_run.run_id), last_event = greatest(v_cut - 1, 1)
    WHERE r.run_id = p_new;
    IF v_cut > 1 THEN
        UPDATE {schema}.event e SET at = v_first.at WHERE e.run_id = p_new AND e.event_id = 1;
        INSERT INTO {schema}.event (run_id, event_id, type, at, seq, name, payload, attributes)
        SELECT p_new, e.event_id, e.type, e.at, e.seq, e.name, e.payload, e.attributes
        FROM {schema}.event e WHERE e.run_id = v_run.run_id AND e.event_id > 1 AND e.event_id < v_cut;
    END IF;
    -- What others see of the run, its events say.
    FOR v_first IN
        SELECT e.* FROM {schema}.event e
        WHERE e.run_id = v_run.run_id AND e.event_id < v_cut AND e.type IN ('SearchUpserted', 'EntityChanged')
        ORDER BY e.event_id
    LOOP
        PERFORM {schema}.carry_out(
            p_new, v_first.event_id, v_first.type, v_first.seq, v_first.name, v_first.payload, v_first.attributes);
    END LOOP;
    PERFORM {schema}.wake(ARRAY[v_run.stream_id]);
    reset_run.status := 'ok';
END
$$;

-- Internal: give a run that is taken up again (p_to) what the runs were told that went on for it: by continue-as-new, or as
-- further attempts.
CREATE FUNCTION {schema}.hand_back(p_run {schema}.run, p_to uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_run {schema}.run := p_run;
    v_known int;
    v_updates text[];
BEGIN
    -- One that a reset made has been given all that anew.
    WHILE v_run.next_run_id = {schema}.derived_id(v_run.run_id, 'next') LOOP
        -- The first signals of each are those that the one before left unread; so it may have been with updates.
        SELECT count(*) FILTER (WHERE e.type = 'SignalReceived'),
               coalesce(array_agg(e.attributes ->> 'update_id') FILTER (WHERE e.type = 'UpdateAccepted'), '{}')
        INTO v_known, v_updates
        FROM {schema}.event l, json_array_elements_text({schema}.readable(l.attributes) -> 'unread') u (id), {schema}.event e
        WHERE l.run_id = v_run.run_id AND l.event_id = v_run.last_event AND e.run_id = l.run_id AND e.event_id = u.id::int;
        -- Nobody tells it more from here on.
        SELECT r.* INTO v_run FROM {schema}.run r WHERE r.run_id = v_run.next_run_id FOR UPDATE;
        EXIT WHEN NOT FOUND;
        INSERT INTO {schema}.inbox (run_id, type, name, payload, attributes)
        SELECT p_to, t.type, t.name, t.payload, CASE t.type WHEN 'UpdateRequested' THEN t.attributes END
        FROM (SELECT s.*, row_number() OVER (PARTITION BY s.type ORDER BY s.n) AS nth
              FROM (SELECT CASE e.type WHEN 'UpdateAccepted' THEN 'UpdateRequested' ELSE e.type END AS type, e.name, e.payload,
                           e.attributes, e.event_id AS n
                    FROM {schema}.event e WHERE e.run_id = v_run.run_id AND e.type IN ('SignalReceived', 'UpdateAccepted')
                    UNION ALL
                    SELECT i.type, i.name, i.payload, i.attributes, v_run.last_event + i.inbox_id
                    FROM {schema}.inbox i WHERE i.run_id = v_run.run_id AND i.type IN ('SignalReceived', 'UpdateRequested')
                   ) s) t
        -- Those that are carried the attempt before had been given, when its time was over.
        WHERE CASE t.type WHEN 'SignalReceived' THEN t.nth > v_known AND t.attributes -> 'carried' IS NULL ELSE t.attributes ->> 'update_id' <> ALL (v_updates) END
        ORDER BY t.n;
        PERFORM {schema}.hand_over_updates(v_run.run_id, p_to, true);
    END LOOP;
END
$$;
