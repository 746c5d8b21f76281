-- What a run lets others see while it runs: search attributes, its entity, its output.

-- Internal: the search attributes and the entity that a run is started with (or continues with), if any.
CREATE FUNCTION {schema}.begin_state(p_run uuid, p_facts json)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF json_typeof(p_facts -> 'search') = 'object' OR json_typeof(p_facts -> 'entity') = 'object' THEN
        INSERT INTO {schema}.run_state (run_id, search, entity)
        VALUES (p_run, coalesce((p_facts -> 'search')::jsonb, '{}'), coalesce((p_facts -> 'entity')::jsonb, '{}'));
    END IF;
END
$$;

-- Internal: set search attributes; null removes one.
CREATE FUNCTION {schema}.upsert_search(p_run uuid, p_search jsonb)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
BEGIN
    IF jsonb_typeof(p_search) = 'object' THEN
        INSERT INTO {schema}.run_state AS s (run_id, search) VALUES (p_run, jsonb_strip_nulls(p_search))
        ON CONFLICT (run_id) DO UPDATE SET search = jsonb_strip_nulls(s.search || p_search);
    END IF;
END
$$;

-- Internal: one value merged into another: objects key by key, anything else is replaced.
CREATE FUNCTION {schema}.merge_json(p_old jsonb, p_new jsonb)
RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_merged jsonb := p_old;
    v_item record;
BEGIN
    IF jsonb_typeof(p_old) IS DISTINCT FROM 'object' OR jsonb_typeof(p_new) <> 'object' THEN
        RETURN p_new;
    END IF;
    FOR v_item IN SELECT * FROM jsonb_each(p_new) e (key, value) LOOP
        IF jsonb_typeof(v_item.value) = 'object' AND jsonb_typeof(p_old -> v_item.key) = 'object' THEN
            v_merged := jsonb_set(v_merged, ARRAY[v_item.key], {schema}.merge_json(p_old -> v_item.key, v_item.value));
        ELSE
            v_merged := v_merged || jsonb_build_object(v_item.key, v_item.value);
        END IF;
    END LOOP;
    RETURN v_merged;
END
$$;

-- Internal: a document after one change: {"op": put | merge | append | prepend | drop, "path": [...], "value": ...}.
-- What is not there on the way is made; the engine has checked that what is there can be changed so.
CREATE FUNCTION {schema}.changed_entity(p_entity jsonb, p_change json)
RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_op text := p_change ->> 'op';
    v_path text[] := ARRAY(SELECT json_array_elements_text(p_change -> 'path'));
    v_value jsonb := p_change -> 'value';
    v_entity jsonb := p_entity;
    v_old jsonb;
BEGIN
    IF v_op = 'drop' THEN
        RETURN v_entity #- v_path;
    END IF;
    FOR i IN 1 .. cardinality(v_path) - 1 LOOP
        IF v_entity #> v_path[1:i] IS NULL THEN
            v_entity := jsonb_set(v_entity, v_path[1:i], '{}');
        END IF;
    END LOOP;
    v_old := v_entity #> v_path;
    v_value := CASE v_op
        WHEN 'put' THEN v_value
        WHEN 'merge' THEN {schema}.merge_json(v_old, v_value)
        WHEN 'append' THEN coalesce(v_old, '[]') || jsonb_build_array(v_value)
        WHEN 'prepend' THEN jsonb_build_array(v_value) || coalesce(v_old, '[]') END;
    RETURN CASE WHEN cardinality(v_path) = 0 THEN v_value ELSE jsonb_set(v_entity, v_path, v_value) END;
END
$$;

-- Internal: change a run's entity.
CREATE FUNCTION {schema}.change_entity(p_run uuid, p_change json)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
BEGIN
    UPDATE {schema}.run_state s SET entity = {schema}.changed_entity(s.entity, p_change) WHERE s.run_id = p_run;
    IF NOT FOUND THEN
        INSERT INTO {schema}.run_state (run_id, entity) VALUES (p_run, {schema}.changed_entity('{}', p_change));
    END IF;
END
$$;

-- A run's search attributes and its entity, as far as the caller may see the run.
CREATE FUNCTION {schema}.get_state(p_run uuid)
RETURNS TABLE (search text, entity text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run {schema}.run := {schema}.find_run(p_run, NULL, 'r');
BEGIN
    RETURN QUERY SELECT s.search::text, s.entity::text FROM {schema}.run_state s WHERE s.run_id = v_run.run_id;
END
$$;

-- Output --------------------------------------------------------------------------------------------------------------

-- Internal: tell who follows a run's output that there is more.
CREATE FUNCTION {schema}.wake_followers(p_run uuid)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    v_channel uuid;
BEGIN
    FOR v_channel IN
        SELECT w.channel FROM {schema}.waiter w WHERE w.run_id = p_run AND w.output_until > clock_timestamp() LIMIT 10000
    LOOP
        -- As everywhere: a full notification queue fails nothing; who waits looks from time to time.
        IF pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('durable:c' || v_channel, '');
        END IF;
    END LOOP;
END
$$;

-- Internal: at which offset the output of the run begins that goes on for this one, which was started with p_facts.
CREATE FUNCTION {schema}.next_output(p_run uuid, p_facts json)
RETURNS json
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
BEGIN
    RETURN coalesce(
        (SELECT to_json((e.attributes ->> 'offset')::int + 1) FROM {schema}.event e
         WHERE e.run_id = p_run AND e.type = 'OutputWritten' ORDER BY (e.attributes ->> 'offset')::int DESC LIMIT 1),
        p_facts -> 'outputs');
END
$$;

-- What a run has put out from an offset on, and last (place NULL) its status; no row at all for a run that is missing or
-- foreign.  Offsets go on through continue-as-new and retries: where this one lies with a run before, it is read, and the
-- last row names the run that was read, and the one that goes on for it.
-- p_channel: where NULL, that is all; else it is notified of more, and of the run's end, for p_wait milliseconds.
-- What was being stored while the wish was being committed is found by asking again.
CREATE FUNCTION {schema}.read_output(p_run uuid, p_offset int, p_limit int, p_channel uuid, p_wait bigint)
RETURNS TABLE (place int, payload bytea, status text, run_id uuid, next_run_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
    -- Before the output is read: whatever a closed run has put out is there then.
    v_run {schema}.run := {schema}.find_run(p_run, NULL, 'r');
    v_until timestamptz := clock_timestamp() + least(greatest(p_wait, 0), 3600000) * interval '1 millisecond';
    v_facts json;
    v_before {schema}.run;
BEGIN
    IF v_run.run_id IS NULL THEN
        RETURN;
    END IF;
    LOOP
        SELECT e.attributes INTO v_facts FROM {schema}.event e WHERE e.run_id = v_run.run_id AND e.event_id = 1;
        EXIT WHEN p_offset >= coalesce((v_facts ->> 'outputs')::int, 0);
        -- Whoever starts a run may say in its facts what he likes: it was before this one only if it is of the same chain.
        SELECT r.* INTO v_before FROM {schema}.run r
        WHERE r.run_id = (v_facts ->> 'previous')::uuid AND r.stream_id = v_run.stream_id
          AND coalesce(r.first_run_id, r.run_id) = v_run.first_run_id;
        EXIT WHEN NOT FOUND;
        v_run := v_before;
    END LOOP;
    -- Whoever waits too often is not told, and finds out by looking.
    IF v_run.status = 'running' AND p_channel IS NOT NULL AND (NOT starts_with(session_user, 'dd_') OR {schema}.has_room(session_user, 'waiter', 1)) THEN
        INSERT INTO {schema}.waiter AS w (run_id, channel, until, output_until) VALUES (v_run.run_id, p_channel, v_until, v_until)
        ON CONFLICT (run_id, channel) DO UPDATE SET
            until = greatest(w.until, excluded.until), output_until = greatest(w.output_until, excluded.output_until);
    END IF;
    RETURN QUERY
        SELECT (e.attributes ->> 'offset')::int, e.payload, NULL::text, NULL::uuid, NULL::uuid FROM {schema}.event e
        WHERE e.run_id = v_run.run_id AND e.type = 'OutputWritten' AND (e.attributes ->> 'offset')::int >= p_offset
        ORDER BY (e.attributes ->> 'offset')::int LIMIT least(greatest(p_limit, 1), 10000);
    RETURN QUERY SELECT NULL::int, NULL::bytea, v_run.status, v_run.run_id,
        -- A run that was taken up again by a reset has an output of its own.
        CASE WHEN v_run.status <> 'terminated' THEN v_run.next_run_id END;
END
$$;
