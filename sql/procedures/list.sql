-- Runs by what they are: listed in pages, and counted.
--
-- p_filter is what the client made of a condition; each of its members may be missing, and all that are there must hold:
--   status, name, workflow_id: equal to a text;  statuses, names, workflow_ids, queues, run_ids: one of a list
--   workflow_like, name_like: the workflow id or the name is LIKE it
--   parents: its parent's run id or workflow id is one of these;  since, before: started at, the end not included
--   latest: true of the latest run of each workflow id
--   search, entity: a jsonpath that holds of the search attributes or the entity; both have an index for that
--   rest: a jsonpath that holds of all that is known of the run, which is put together for it, as far as it uses it: uses
--   names what costs something to come by (times, parent, search, entity)
-- Runs that are looked for are taken to be in memory (random_page_cost), or else the planner would rather read a whole table
-- than a hundred rows by an index.
-- The jsonpath language knows nothing but the value that it is given.  A caller who is no administrator sees the runs of
-- the streams whose workflows he consumes, and of those that he may produce to the ones that he started.
-- What a provisioned login looks for is not tried on other runs (fenced), whatever an index could do: how long that takes
-- would tell it something of them.

-- Internal: p_filter, read; with the ids of streams and parents that it names.  Raises 22023 where it makes no sense.
CREATE FUNCTION {schema}.read_filter(
    p_filter jsonb,
    OUT status text, OUT statuses text[], OUT name text, OUT names text[], OUT workflow_id text, OUT workflow_ids text[],
    OUT workflow_like text, OUT name_like text, OUT run_ids uuid[], OUT since timestamptz, OUT before timestamptz,
    OUT search jsonpath, OUT entity jsonpath, OUT rest jsonpath, OUT uses text[], OUT streams int[], OUT own_streams int[], OUT own int, OUT parents uuid[], OUT latest boolean, OUT fenced boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_caller record;
    f record;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    IF octet_length(p_filter::text) > 1048576 THEN
        RAISE EXCEPTION 'a filter has at most 1048576 bytes' USING ERRCODE = '54000';
    END IF;
    SELECT * INTO f FROM jsonb_to_record(coalesce(p_filter, '{}')) x (
        status text, statuses text[], name text, names text[], workflow_id text, workflow_ids text[], workflow_like text,
        name_like text, run_ids uuid[], since timestamptz, before timestamptz, search jsonpath, entity jsonpath, rest jsonpath,
        uses text[], queues text[], parents text[], latest boolean);
    status := f.status; statuses := f.statuses; name := f.name; names := f.names;
    workflow_id := f.workflow_id; workflow_ids := f.workflow_ids; workflow_like := f.workflow_like; name_like := f.name_like;
    -- One that ends in a backslash fails where it comes to that: on whichever row that is, also a foreign one.
    IF (length(workflow_like) - length(rtrim(workflow_like, chr(92)))) % 2 = 1
       OR (length(name_like) - length(rtrim(name_like, chr(92)))) % 2 = 1 THEN
        RAISE EXCEPTION 'this filter cannot be read' USING ERRCODE = '22023';
    END IF;
    latest := f.latest; run_ids := f.run_ids; since := f.since; before := f.before;
    search := f.search; entity := f.entity; rest := f.rest; uses := coalesce(f.uses, '{}');
    IF f.queues IS NOT NULL OR NOT v_caller.is_admin THEN
        streams := ARRAY(
            SELECT s.stream_id FROM {schema}.stream s
            WHERE (f.queues IS NULL OR s.name = ANY (f.queues)) AND (v_caller.is_admin OR EXISTS (
                SELECT 1 FROM {schema}.stream_grant g
                WHERE g.principal_id = v_caller.principal_id AND g.stream_id = s.stream_id
                  AND g.consume AND v_caller.kind <> 'activity')));
    END IF;
    fenced := starts_with(session_user, 'dd_');
    IF NOT v_caller.is_admin THEN
        -- NULL where there is none: the condition then vanishes from the plan.
        SELECT array_agg(s.stream_id) INTO own_streams FROM {schema}.stream s
        JOIN {schema}.stream_grant g ON g.principal_id = v_caller.principal_id AND g.stream_id = s.stream_id AND g.produce
        WHERE (f.queues IS NULL OR s.name = ANY (f.queues)) AND s.stream_id <> ALL (streams);
        own := v_caller.principal_id;
    END IF;
    IF f.parents IS NOT NULL THEN
        parents := ARRAY(SELECT p::uuid FROM unnest(f.parents) p
                         WHERE p COLLATE pg_catalog."C" ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$')
            || ARRAY(SELECT r.run_id FROM {schema}.run r WHERE r.workflow_id = ANY (f.parents));
    END IF;
END
$$;

-- Internal: what the parent of a run is called: its run id and its workflow id; NULL where there is none.
CREATE FUNCTION {schema}.parent_ids(p_parent uuid)
RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_parent IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN to_jsonb(ARRAY[p_parent::text] || ARRAY(SELECT r.workflow_id FROM {schema}.run r WHERE r.run_id = p_parent));
END
$$;

-- A page of runs, by the time of their start or (p_by_close; what still runs comes last) of their end; p_after and
-- p_after_run: that time and the id of the run that the page before ended with.
CREATE FUNCTION {schema}.list_workflows(
    p_filter jsonb, p_by_close boolean, p_descending boolean, p_after timestamptz, p_after_run uuid, p_limit int)
RETURNS TABLE (
    run_id uuid, workflow_id text, name text, queue_name text, status text, started_at timestamptz, closed_at timestamptz,
    last_event int, parent_run_id uuid, memo text, task_failure text, search text, entity text,
    parent_workflow_id text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET random_page_cost = 1.1
AS $$
DECLARE
    f record;
    v_part text;
    v_left int := least(greatest(p_limit, 1), 10001);
    v_rows int;
BEGIN
    SELECT * INTO f FROM {schema}.read_filter(p_filter);
    -- The plan is made for the filter at hand: conditions that are not there vanish, and so do the sort keys of the
    -- other orders.  By their end, what runs and what has closed (which is what runs no more) are two lists one after the
    -- other: the index has those that have closed, in their order.  (What runs has no end to be ordered by; but by its id
    -- alone, the planner would go through all runs.)
    FOREACH v_part IN ARRAY CASE WHEN NOT p_by_close THEN '{all}' WHEN p_descending THEN '{running,closed}'
                                 ELSE '{closed,running}' END::text[] LOOP
    RETURN QUERY
        SELECT r.run_id, r.workflow_id, r.name, q.name, r.status, r.started_at, r.closed_at, r.last_event, r.parent_run_id,
               r.memo::text, r.task_failure, t.search::text, t.entity::text,
               (SELECT p.workflow_id FROM {schema}.run p WHERE p.run_id = r.parent_run_id)
        FROM {schema}.run r
        JOIN {schema}.stream q ON q.stream_id = r.stream_id
        LEFT JOIN {schema}.run_state t ON t.run_id = r.run_id
        WHERE (f.streams IS NULL OR r.stream_id = ANY (f.streams)
               OR f.own_streams IS NOT NULL AND r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own)
          AND (f.status IS NULL OR r.status = f.status) AND (f.statuses IS NULL OR r.status = ANY (f.statuses))
          AND (f.name IS NULL OR r.name = f.name) AND (f.names IS NULL OR r.name = ANY (f.names))
          AND (f.workflow_id IS NULL OR r.workflow_id = f.workflow_id)
          AND (f.workflow_ids IS NULL OR r.workflow_id = ANY (f.workflow_ids))
          AND (f.workflow_like IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  r.workflow_id LIKE f.workflow_like END)
          AND (f.name_like IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  r.name LIKE f.name_like END)
          AND (f.run_ids IS NULL OR r.run_id = ANY (f.run_ids)) AND (f.parents IS NULL OR r.parent_run_id = ANY (f.parents))
          AND (f.since IS NULL OR r.started_at >= f.since) AND (f.before IS NULL OR r.started_at < f.before)
          AND (f.latest IS NOT TRUE OR r.next_run_id IS NULL AND NOT EXISTS (
                  SELECT 1 FROM {schema}.run n
                  WHERE n.workflow_id = r.workflow_id AND n.stream_id = r.stream_id AND n.started_at > r.started_at))
          AND (f.search IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  t.search @@ f.search END)
          AND (f.entity IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  t.entity @@ f.entity END)
          AND (f.rest IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN jsonb_path_match(
                  jsonb_build_object(
                      'workflow_id', r.workflow_id, 'run_id', r.run_id, 'name', r.name, 'status', r.status, 'queue_name', q.name,
                      -- Times are texts of one form, so that they compare as such.
                      'started_at', CASE WHEN 'times' = ANY (f.uses) THEN to_char(r.started_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') END,
                      'closed_at', CASE WHEN 'times' = ANY (f.uses) THEN to_char(r.closed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') END,
                      'parent_id', CASE WHEN 'parent' = ANY (f.uses) THEN {schema}.parent_ids(r.parent_run_id) END,
                      'search', CASE WHEN 'search' = ANY (f.uses) THEN coalesce(t.search, '{}') END,
                      'entity', CASE WHEN 'entity' = ANY (f.uses) THEN coalesce(t.entity, '{}') END),
                  f.rest, '{}', true) END)
          AND CASE v_part WHEN 'running' THEN r.status = 'running' WHEN 'closed' THEN r.closed_at IS NOT NULL ELSE true END
          AND (p_after IS NULL OR CASE
                  WHEN p_descending THEN (CASE v_part WHEN 'all' THEN r.started_at WHEN 'closed' THEN r.closed_at ELSE 'infinity' END, r.run_id)
                                       < (p_after, p_after_run)
                  ELSE (CASE v_part WHEN 'all' THEN r.started_at WHEN 'closed' THEN r.closed_at ELSE 'infinity' END, r.run_id)
                     > (p_after, p_after_run) END)
        ORDER BY CASE WHEN v_part = 'all' AND NOT p_descending THEN r.started_at END,
                 CASE WHEN v_part = 'all' AND p_descending THEN r.started_at END DESC,
                 CASE WHEN v_part <> 'all' AND NOT p_descending THEN r.closed_at END,
                 CASE WHEN v_part <> 'all' AND p_descending THEN r.closed_at END DESC,
                 CASE WHEN NOT p_descending THEN r.run_id END, CASE WHEN p_descending THEN r.run_id END DESC
        LIMIT v_left;
        GET DIAGNOSTICS v_rows = ROW_COUNT;
        v_left := v_left - v_rows;
        EXIT WHEN v_left = 0;
    END LOOP;
EXCEPTION WHEN syntax_error OR undefined_object THEN
    -- A jsonpath that is none, or that has variables: no client of ours makes one.
    RAISE EXCEPTION 'this filter cannot be read' USING ERRCODE = '22023';
END
$$;

-- How many runs there are; by status, name, queue_name, or by what lies at p_path in their search attributes or entities
-- (p_group), as JSON; NULL where there is nothing.
CREATE FUNCTION {schema}.count_workflows(p_filter jsonb, p_group text, p_path text[])
RETURNS TABLE (value text, runs bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET random_page_cost = 1.1
AS $$
DECLARE
    f record;
BEGIN
    SELECT * INTO f FROM {schema}.read_filter(p_filter);
    RETURN QUERY
        SELECT g.value::text, count(*)
        FROM {schema}.run r
        JOIN {schema}.stream q ON q.stream_id = r.stream_id
        LEFT JOIN {schema}.run_state t ON t.run_id = r.run_id,
        LATERAL (SELECT CASE p_group
            WHEN 'status' THEN to_jsonb(r.status) WHEN 'name' THEN to_jsonb(r.name) WHEN 'queue_name' THEN to_jsonb(q.name)
            WHEN 'search' THEN t.search #> p_path WHEN 'entity' THEN t.entity #> p_path END) g (value)
        WHERE (f.streams IS NULL OR r.stream_id = ANY (f.streams)
               OR f.own_streams IS NOT NULL AND r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own)
          AND (f.status IS NULL OR r.status = f.status) AND (f.statuses IS NULL OR r.status = ANY (f.statuses))
          AND (f.name IS NULL OR r.name = f.name) AND (f.names IS NULL OR r.name = ANY (f.names))
          AND (f.workflow_id IS NULL OR r.workflow_id = f.workflow_id)
          AND (f.workflow_ids IS NULL OR r.workflow_id = ANY (f.workflow_ids))
          AND (f.workflow_like IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  r.workflow_id LIKE f.workflow_like END)
          AND (f.name_like IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  r.name LIKE f.name_like END)
          AND (f.run_ids IS NULL OR r.run_id = ANY (f.run_ids)) AND (f.parents IS NULL OR r.parent_run_id = ANY (f.parents))
          AND (f.since IS NULL OR r.started_at >= f.since) AND (f.before IS NULL OR r.started_at < f.before)
          AND (f.latest IS NOT TRUE OR r.next_run_id IS NULL AND NOT EXISTS (
                  SELECT 1 FROM {schema}.run n
                  WHERE n.workflow_id = r.workflow_id AND n.stream_id = r.stream_id AND n.started_at > r.started_at))
          AND (f.search IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  t.search @@ f.search END)
          AND (f.entity IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN
                  t.entity @@ f.entity END)
          AND (f.rest IS NULL OR CASE WHEN NOT f.fenced OR r.stream_id = ANY (f.streams) OR r.stream_id = ANY (f.own_streams) AND r.principal_id = f.own THEN jsonb_path_match(
                  jsonb_build_object(
                      'workflow_id', r.workflow_id, 'run_id', r.run_id, 'name', r.name, 'status', r.status, 'queue_name', q.name,
                      -- Times are texts of one form, so that they compare as such.
                      'started_at', CASE WHEN 'times' = ANY (f.uses) THEN to_char(r.started_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') END,
                      'closed_at', CASE WHEN 'times' = ANY (f.uses) THEN to_char(r.closed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') END,
                      'parent_id', CASE WHEN 'parent' = ANY (f.uses) THEN {schema}.parent_ids(r.parent_run_id) END,
                      'search', CASE WHEN 'search' = ANY (f.uses) THEN coalesce(t.search, '{}') END,
                      'entity', CASE WHEN 'entity' = ANY (f.uses) THEN coalesce(t.entity, '{}') END),
                  f.rest, '{}', true) END)
        GROUP BY g.value;
EXCEPTION WHEN syntax_error OR undefined_object THEN
    -- A jsonpath that is none, or that has variables: no client of ours makes one.
    RAISE EXCEPTION 'this filter cannot be read' USING ERRCODE = '22023';
END
$$;
