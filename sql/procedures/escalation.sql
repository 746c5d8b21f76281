-- Escalations: what a run waits for somebody to do.
--
-- One row decides: whoever closes it (resolves, cancels, takes it back for the run, or lets it time out) does so under its
-- lock, in the transaction that tells the run.  Locks are taken in the order run, escalation; who changes an escalation from
-- outside has a key-share lock on its run, so that a run that closes meets nobody at its escalations.
-- An escalation belongs to its run's stream: who may consume or produce there may see and change it.

-- Internal: how an escalation stands now.
CREATE FUNCTION {schema}.escalation_status(p_escalation {schema}.escalation)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE
        WHEN p_escalation.status <> 'open' THEN p_escalation.status
        WHEN {schema}.escalation_holder(p_escalation) IS NULL THEN 'waiting'
        ELSE 'claimed' END;
END
$$;

-- Internal: who has claimed an escalation; NULL where nobody has, or the claim ran out.
CREATE FUNCTION {schema}.escalation_holder(p_escalation {schema}.escalation)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_escalation.status = 'open' AND (p_escalation.claimed_until > clock_timestamp()) IS NOT FALSE
                THEN p_escalation.claimed_by END;
END
$$;

-- Internal: an escalation as those outside see it.  Values are the bytes that the run knows, in hexadecimal, and metadata
-- a text (one that nobody can read hides nothing else); times are milliseconds since the epoch.
CREATE FUNCTION {schema}.show_escalation(p_escalation {schema}.escalation)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_status text := {schema}.escalation_status(p_escalation);
    v_run {schema}.run;
BEGIN
    SELECT r.* INTO v_run FROM {schema}.run r WHERE r.run_id = p_escalation.run_id;
    RETURN json_build_object(
        'id', p_escalation.escalation_id,
        'workflow_id', v_run.workflow_id,
        'run_id', p_escalation.run_id,
        'workflow', v_run.name,
        'role', p_escalation.role,
        'subject', p_escalation.subject,
        'type', p_escalation.type,
        'priority', p_escalation.priority,
        'status', v_status,
        'payload', encode(p_escalation.payload, 'hex'),
        'metadata', p_escalation.metadata::text,
        'opened_at', (extract(epoch FROM p_escalation.opened_at) * 1000)::bigint,
        'times_out_at', (extract(epoch FROM p_escalation.times_out_at) * 1000)::bigint,
        'claimed_by', CASE v_status WHEN 'claimed' THEN p_escalation.claimed_by END,
        'claimed_until', CASE v_status WHEN 'claimed' THEN (extract(epoch FROM p_escalation.claimed_until) * 1000)::bigint END,
        'closed_at', (extract(epoch FROM p_escalation.closed_at) * 1000)::bigint,
        'resolved_by', p_escalation.resolved_by,
        'result', encode(p_escalation.result, 'hex'))::text;
END
$$;

-- Internal: the escalation, if the caller may see it; foreign and missing look the same.
CREATE FUNCTION {schema}.find_escalation(p_escalation uuid)
RETURNS {schema}.escalation
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_streams int[] := {schema}.escalation_streams();
    v_found {schema}.escalation;
BEGIN
    SELECT e.* INTO v_found FROM {schema}.escalation e
    WHERE e.escalation_id = p_escalation AND (v_streams IS NULL OR e.stream_id = ANY (v_streams));
    RETURN v_found;
END
$$;

-- Internal: the streams whose escalations the caller may see and decide; NULL: all, he is an administrator.
-- Who runs a stream's workflows may, and an application that may send there (people use it); no other producer.
CREATE FUNCTION {schema}.escalation_streams()
RETURNS int[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_caller record;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    RETURN CASE WHEN NOT v_caller.is_admin THEN ARRAY(
        SELECT g.stream_id FROM {schema}.stream_grant g
        WHERE g.principal_id = v_caller.principal_id
          AND (g.consume AND v_caller.kind <> 'activity' OR g.produce AND v_caller.kind = 'application')) END;
END
$$;

-- Internal: a time so many milliseconds later; NULL: never.
CREATE FUNCTION {schema}.escalation_time(p_from timestamptz, p_ms bigint)
RETURNS timestamptz
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_ms IS NOT NULL THEN
        p_from + least(greatest(p_ms, 0), 315360000000) * interval '1 millisecond' END;
END
$$;

-- What a run's step does --------------------------------------------------------------------------------------

-- Internal: whether a step may take its escalation back (let it time out, or withdraw it): not one that somebody has
-- resolved or cancelled, or is at in this moment.  The row stays locked.  One that the step itself opens is not there yet.
CREATE FUNCTION {schema}.may_take_back(p_run uuid, p_seq int)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
    v_id uuid := overlay(md5(p_run::text || ':' || p_seq) PLACING '8' FROM 13)::uuid;
BEGIN
    PERFORM 1 FROM {schema}.escalation e WHERE e.escalation_id = v_id AND e.status = 'open' FOR UPDATE SKIP LOCKED;
    RETURN FOUND OR NOT EXISTS (SELECT 1 FROM {schema}.escalation e WHERE e.escalation_id = v_id);
END
$$;

-- Internal: the run opens an escalation.
CREATE FUNCTION {schema}.open_escalation(p_run uuid, p_seq int, p_role text, p_payload bytea, p_attributes json)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_facts record;
BEGIN
    SELECT * INTO v_facts FROM json_to_record(p_attributes) x (subject text, type text, priority int, ms bigint, metadata jsonb);
    INSERT INTO {schema}.escalation (
        escalation_id, run_id, seq, stream_id, role, type, subject, priority, payload, metadata, opened_at, times_out_at)
    SELECT overlay(md5(p_run::text || ':' || p_seq) PLACING '8' FROM 13)::uuid, p_run, p_seq, r.stream_id, p_role,
           v_facts.type, v_facts.subject, coalesce(v_facts.priority, 0), p_payload, v_facts.metadata, v_now,
           {schema}.escalation_time(v_now, v_facts.ms)
    FROM {schema}.run r WHERE r.run_id = p_run
    ON CONFLICT DO NOTHING;
END
$$;

-- Internal: the run takes an escalation back; may_take_back() was asked.
CREATE FUNCTION {schema}.take_back_escalation(p_run uuid, p_seq int, p_status text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE {schema}.escalation e SET status = p_status, closed_at = clock_timestamp(), claimed_by = NULL, claimed_until = NULL
    WHERE e.escalation_id = overlay(md5(p_run::text || ':' || p_seq) PLACING '8' FROM 13)::uuid AND e.status = 'open';
END
$$;

-- Internal: a run has closed; its row is locked.
CREATE FUNCTION {schema}.cancel_escalations(p_run uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
BEGIN
    WITH cancelled AS (
        UPDATE {schema}.escalation e
        SET status = 'cancelled', closed_at = clock_timestamp(), claimed_by = NULL, claimed_until = NULL
        WHERE e.run_id = p_run AND e.status = 'open'
        RETURNING e.escalation_id)
    DELETE FROM {schema}.message m
    USING (SELECT q.message_id, q.stream_id FROM cancelled c JOIN {schema}.message q ON q.message_id = c.escalation_id
           WHERE q.run_id = p_run AND q.lease_token IS NULL
           FOR UPDATE OF q SKIP LOCKED) t
    WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
END
$$;

-- What is done from outside -----------------------------------------------------------------------------------

-- Internal: resolve or cancel an open escalation whose row is locked, and tell its run.  p_trace: as for post().
CREATE FUNCTION {schema}.close_escalation(
    p_escalation {schema}.escalation, p_status text, p_by text, p_result bytea, p_call uuid, p_later boolean,
    p_trace text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
BEGIN
    UPDATE {schema}.escalation e
    SET status = p_status, closed_at = clock_timestamp(), resolved_by = p_by, result = p_result, changed_by = p_call,
        claimed_by = NULL, claimed_until = NULL
    WHERE e.escalation_id = p_escalation.escalation_id;
    -- What would have let it time out.
    DELETE FROM {schema}.message m
    USING (SELECT q.message_id, q.stream_id FROM {schema}.message q
           WHERE q.message_id = p_escalation.escalation_id AND q.run_id = p_escalation.run_id AND q.lease_token IS NULL
           FOR UPDATE OF q SKIP LOCKED) t
    WHERE m.message_id = t.message_id AND m.stream_id = t.stream_id;
    INSERT INTO {schema}.inbox (run_id, type, seq, name, payload, attributes)
    VALUES (p_escalation.run_id, CASE p_status WHEN 'resolved' THEN 'EscalationResolved' ELSE 'EscalationCancelled' END,
            p_escalation.seq, p_escalation.role, p_result,
            {schema}.with_fact({schema}.trace_of(p_trace), 'by', to_json(p_by)));
    PERFORM {schema}.add_tasks(ARRAY[p_escalation.run_id], p_later);
END
$$;

-- Change an escalation.  p_verb:
--   claim     for p_by, for p_ms milliseconds (NULL: until it is released); by its holder again: prolonged
--   release   by its holder
--   resolve   with p_payload, by its holder, or by anybody where nobody holds it
--   cancel    whoever holds it
--   reassign  to the role p_role; it is nobody's then
-- p_call: the call's own id.  The same call again is answered as before.  p_trace: the span that it comes from, as for post().
-- Answers missing; or ok, or conflict (it is closed, or another has it), and the escalation as it stands.
CREATE FUNCTION {schema}.change_escalation(
    p_sender uuid, p_batch bigint, p_verb text, p_escalation uuid, p_call uuid, p_by text, p_ms bigint, p_role text,
    p_payload bytea, p_trace text DEFAULT NULL)
RETURNS TABLE (answer text, escalation text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
    v_found {schema}.escalation;
    v_holder text;
BEGIN
    PERFORM {schema}.begin_batch(p_sender, p_batch, 1);
    IF (p_verb IN ('claim', 'release', 'resolve', 'cancel', 'reassign')) IS NOT TRUE OR p_call IS NULL
       OR (p_verb IN ('claim', 'release') AND p_by IS NULL) OR (p_verb = 'reassign' AND p_role IS NULL) THEN
        RAISE EXCEPTION 'an escalation is claimed or released by somebody, resolved, cancelled, or reassigned to a role'
        USING ERRCODE = '22023';
    END IF;
    v_found := {schema}.find_escalation(p_escalation);
    IF v_found.escalation_id IS NULL THEN
        RETURN QUERY SELECT 'missing', NULL::text;
        RETURN;
    END IF;
    -- The run does not close meanwhile.
    PERFORM 1 FROM {schema}.run r WHERE r.run_id = v_found.run_id FOR KEY SHARE;
    SELECT e.* INTO v_found FROM {schema}.escalation e WHERE e.escalation_id = p_escalation FOR UPDATE;
    v_holder := {schema}.escalation_holder(v_found);
    answer := 'conflict';
    IF v_found.changed_by = p_call THEN
        answer := 'ok';
    ELSIF v_found.status = 'open' THEN
        IF p_verb = 'claim' AND coalesce(v_holder, p_by) = p_by THEN
            answer := 'ok';
            UPDATE {schema}.escalation e
            SET claimed_by = p_by, changed_by = p_call,
                claimed_until = {schema}.escalation_time(clock_timestamp(), p_ms)
            WHERE e.escalation_id = p_escalation;
        ELSIF p_verb = 'release' AND v_holder = p_by THEN
            answer := 'ok';
            UPDATE {schema}.escalation e SET claimed_by = NULL, claimed_until = NULL, changed_by = p_call
            WHERE e.escalation_id = p_escalation;
        ELSIF p_verb = 'reassign' THEN
            answer := 'ok';
            UPDATE {schema}.escalation e SET role = p_role, claimed_by = NULL, claimed_until = NULL, changed_by = p_call
            WHERE e.escalation_id = p_escalation;
        ELSIF p_verb = 'resolve' AND (v_holder IS NULL OR v_holder = p_by) THEN
            answer := 'ok';
            PERFORM {schema}.close_escalation(v_found, 'resolved', p_by, p_payload, p_call, p_sender IS NULL, p_trace);
        ELSIF p_verb = 'cancel' THEN
            answer := 'ok';
            PERFORM {schema}.close_escalation(v_found, 'cancelled', NULL, NULL, p_call, p_sender IS NULL, p_trace);
        END IF;
        SELECT e.* INTO v_found FROM {schema}.escalation e WHERE e.escalation_id = p_escalation;
    END IF;
    escalation := {schema}.show_escalation(v_found);
    RETURN NEXT;
END
$$;

-- Claim the escalation of a role that comes first, by priority and then age, and is nobody's: each is given to one caller.
-- p_ms: for how many milliseconds; NULL: until it is released.  p_metadata: an object that its metadata must have.
-- p_again: whether the call is repeated because its answer was lost.
-- Answers it, or NULL where there is none.
CREATE FUNCTION {schema}.claim_escalation(
    p_sender uuid, p_batch bigint, p_call uuid, p_again bigint, p_role text, p_metadata text, p_by text, p_ms bigint)
RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_streams int[] := {schema}.escalation_streams();
    v_metadata jsonb := p_metadata::jsonb;
    v_found {schema}.escalation;
BEGIN
    PERFORM {schema}.begin_batch(p_sender, p_batch, 1);
    IF p_call IS NULL OR p_role IS NULL OR p_by IS NULL THEN
        RAISE EXCEPTION 'an escalation is claimed by somebody, for a role' USING ERRCODE = '22023';
    END IF;
    IF p_again > 0 THEN
        SELECT e.* INTO v_found FROM {schema}.escalation e
        WHERE e.role = p_role AND e.status = 'open' AND e.changed_by = p_call
          AND (v_streams IS NULL OR e.stream_id = ANY (v_streams));
    END IF;
    IF v_found.escalation_id IS NULL THEN
        -- The run first, as everywhere: it does not close meanwhile; one that is closing is passed by.
        WITH c AS MATERIALIZED (
            SELECT e.escalation_id FROM {schema}.escalation e JOIN {schema}.run r ON r.run_id = e.run_id
            WHERE e.role = p_role AND e.status = 'open'
              AND (e.claimed_by IS NULL OR e.claimed_until <= clock_timestamp())
              AND (v_metadata IS NULL OR e.metadata @> v_metadata)
              AND (v_streams IS NULL OR e.stream_id = ANY (v_streams))
            ORDER BY e.priority, e.opened_at LIMIT 1
            FOR KEY SHARE OF r SKIP LOCKED FOR UPDATE OF e SKIP LOCKED)
        UPDATE {schema}.escalation e
        SET claimed_by = p_by, changed_by = p_call,
            claimed_until = {schema}.escalation_time(clock_timestamp(), p_ms)
        FROM c WHERE e.escalation_id = c.escalation_id
        RETURNING e.* INTO v_found;
    END IF;
    RETURN CASE WHEN v_found.escalation_id IS NOT NULL THEN {schema}.show_escalation(v_found) END;
END
$$;

-- One escalation; NULL where it is missing or foreign.
CREATE FUNCTION {schema}.get_escalation(p_escalation uuid)
RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_found {schema}.escalation := {schema}.find_escalation(p_escalation);
BEGIN
    RETURN CASE WHEN v_found.escalation_id IS NOT NULL THEN {schema}.show_escalation(v_found) END;
END
$$;

-- Escalations, by priority and then age; NULL filters match all.
-- p_status: waiting, claimed, resolved, cancelled or timed_out.  p_metadata: an object that their metadata must have.
-- p_after: the one that the page before ended with; raises DD001 where that is missing or foreign.
CREATE FUNCTION {schema}.list_escalations(
    p_role text, p_status text, p_subject text, p_type text, p_run uuid, p_metadata text, p_limit int, p_after uuid DEFAULT NULL)
RETURNS TABLE (escalation text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_streams int[] := {schema}.escalation_streams();
    v_metadata jsonb := p_metadata::jsonb;
    v_statuses text[] := CASE WHEN p_status IN ('waiting', 'claimed') THEN ARRAY['open'] WHEN p_status IS NOT NULL THEN ARRAY[p_status]
                              ELSE '{open,resolved,cancelled,timed_out}' END;
    v_now timestamptz := clock_timestamp();
    v_most int := least(greatest(p_limit, 0), 10000);
    v_after {schema}.escalation;
BEGIN
    IF p_after IS NOT NULL THEN
        v_after := {schema}.find_escalation(p_after);
        IF v_after.escalation_id IS NULL THEN
            RAISE EXCEPTION 'no such escalation, or this login may not use it' USING ERRCODE = 'DD001';
        END IF;
    END IF;
    -- The index has them in their order within a status.
    RETURN QUERY
        SELECT {schema}.show_escalation(f.found)
        FROM unnest(v_statuses) s (status) CROSS JOIN LATERAL (
        SELECT e AS found FROM {schema}.escalation e
        WHERE e.status = s.status
          AND (p_role IS NULL OR e.role = p_role)
          AND (p_after IS NULL OR (e.priority, e.opened_at, e.escalation_id)
                                > (v_after.priority, v_after.opened_at, v_after.escalation_id))
          AND (p_status IS DISTINCT FROM 'waiting' OR e.claimed_by IS NULL OR e.claimed_until <= v_now)
          AND (p_status IS DISTINCT FROM 'claimed' OR (e.claimed_by IS NOT NULL AND (e.claimed_until > v_now) IS NOT FALSE))
          AND (p_subject IS NULL OR e.subject = p_subject)
          AND (p_type IS NULL OR e.type = p_type)
          AND (p_run IS NULL OR e.run_id = p_run)
          AND (v_metadata IS NULL OR e.metadata @> v_metadata)
          AND (v_streams IS NULL OR e.stream_id = ANY (v_streams))
        ORDER BY e.priority, e.opened_at, e.escalation_id LIMIT v_most) f
        ORDER BY (f.found).priority, (f.found).opened_at, (f.found).escalation_id LIMIT v_most;
END
$$;

-- How many escalations of a role (NULL: of all) there are of each kind.
CREATE FUNCTION {schema}.count_escalations(p_role text)
RETURNS TABLE (waiting bigint, claimed bigint, resolved bigint, cancelled bigint, timed_out bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_streams int[] := {schema}.escalation_streams();
    v_now timestamptz := clock_timestamp();
BEGIN
    RETURN QUERY
        SELECT count(*) FILTER (WHERE e.status = 'open' AND (e.claimed_by IS NULL OR e.claimed_until <= v_now)),
               count(*) FILTER (WHERE e.status = 'open' AND e.claimed_by IS NOT NULL AND (e.claimed_until > v_now) IS NOT FALSE),
               count(*) FILTER (WHERE e.status = 'resolved'),
               count(*) FILTER (WHERE e.status = 'cancelled'),
               count(*) FILTER (WHERE e.status = 'timed_out')
        FROM {schema}.escalation e
        WHERE (p_role IS NULL OR e.role = p_role) AND (v_streams IS NULL OR e.stream_id = ANY (v_streams));
END
$$;

-- For SQL: resolve an escalation, in the caller's own transaction.
--
-- p_payload: what the workflow gets; p_by: who resolves it, needed where somebody has claimed it.
-- Raises DD001 where it is missing or foreign, and DD007 where it is closed, or another has claimed it.
CREATE FUNCTION {schema}.resolve_escalation(p_escalation uuid, p_payload jsonb DEFAULT NULL, p_by text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_done record;
    v_now {schema}.escalation;
BEGIN
    SELECT * INTO v_done FROM {schema}.change_escalation(
        NULL, NULL, 'resolve', p_escalation, gen_random_uuid(), p_by, NULL, NULL, convert_to(p_payload::text, 'UTF8'));
    IF v_done.answer = 'missing' THEN
        RAISE EXCEPTION 'no such escalation, or this login may not use it' USING ERRCODE = 'DD001';
    ELSIF v_done.answer <> 'ok' THEN
        SELECT e.* INTO v_now FROM {schema}.escalation e WHERE e.escalation_id = p_escalation;
        RAISE EXCEPTION 'the escalation % is %', p_escalation,
            coalesce('claimed by ' || quote_literal({schema}.escalation_holder(v_now)), {schema}.escalation_status(v_now))
        USING ERRCODE = 'DD007', HINT = 'Say who resolves it with p_by, or claim it.';
    END IF;
END
$$;
