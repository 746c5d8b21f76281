-- How much a provisioned login may have in the tables at once.
--
-- Its rows are charged to it by their column lot.  Nobody keeps a counter, whose row an open transaction could hold: who is
-- about to store something looks how much is there.  That is approximate: what other sessions have not committed is not
-- seen, and of many rows only a lot is looked at.

-- Internal: whether a login's principal may have so many rows more.  True where nothing limits it.
-- p_of: the run whose rows count, where they are counted for each.  p_ending: so many of its rows end in this transaction.
CREATE FUNCTION {schema}.has_room(p_login text, p_what text, p_items int, p_of uuid DEFAULT NULL, p_ending int DEFAULT 0)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_items bigint := coalesce(p_items, 0);
    v_principal int;
    v_most bigint;
    v_from text := p_login || '/';
    v_to text := p_login || '0';
    v_skip bigint;
BEGIN
    SELECT p.principal_id, p.max_live INTO v_principal, v_most
    FROM {schema}.login l JOIN {schema}.principal p ON p.principal_id = l.principal_id WHERE l.login = p_login;
    IF v_most IS NULL OR v_items = 0 THEN
        RETURN true;
    END IF;
    -- What is kept for a while is more than what is under way; what a process has a few of is never many.
    v_most := CASE WHEN p_what IN ('result', 'dead_letter') THEN 10 * v_most
                   WHEN p_what = 'sender' THEN 10000 WHEN p_what IN ('worker', 'schedule', 'subscription') THEN 100
                   ELSE v_most END + p_ending;
    IF v_most > 10000 AND p_of IS NULL THEN
        -- By chance, which only the database decides: whoever knew the lot could keep clear of it.
        v_from := v_from || lpad((get_byte(uuid_send(gen_random_uuid()), 0) & 63)::text, 2, '0');
        v_to := v_from || ' ';
        v_most := v_most / 64;
        v_items := (v_items + 63) / 64;
    END IF;
    v_skip := v_most - v_items;
    IF v_skip < 0 THEN
        RETURN false;
    END IF;
    CASE p_what
        WHEN 'message' THEN
            PERFORM 1 FROM {schema}.message o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'inbox' THEN
            PERFORM 1 FROM {schema}.inbox o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'run' THEN
            PERFORM 1 FROM {schema}.run o
            WHERE o.lot >= v_from AND o.lot < v_to AND o.status = 'running' OFFSET v_skip LIMIT 1;
        WHEN 'run_query' THEN
            PERFORM 1 FROM {schema}.run_query o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'topic_event' THEN
            PERFORM 1 FROM {schema}.topic_event o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'dead_letter' THEN
            PERFORM 1 FROM {schema}.dead_letter o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'result' THEN
            PERFORM 1 FROM {schema}.result o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'limiter' THEN
            PERFORM 1 FROM {schema}.limiter o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'sender' THEN
            PERFORM 1 FROM {schema}.sender o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'waiter' THEN
            PERFORM 1 FROM {schema}.waiter o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'update_waiter' THEN
            PERFORM 1 FROM {schema}.update_waiter o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'result_waiter' THEN
            PERFORM 1 FROM {schema}.result_waiter o WHERE o.lot >= v_from AND o.lot < v_to OFFSET v_skip LIMIT 1;
        WHEN 'signal_key' THEN
            PERFORM 1 FROM {schema}.signal_key o WHERE o.run_id = p_of OFFSET v_skip LIMIT 1;
        WHEN 'run_update' THEN
            PERFORM 1 FROM {schema}.run_update o WHERE o.chain_id = p_of OFFSET v_skip LIMIT 1;
        WHEN 'worker' THEN
            PERFORM 1 FROM {schema}.worker o WHERE o.principal_id = v_principal OFFSET v_skip LIMIT 1;
        WHEN 'schedule' THEN
            PERFORM 1 FROM {schema}.schedule o WHERE o.space = v_principal OFFSET v_skip LIMIT 1;
        WHEN 'subscription' THEN
            PERFORM 1 FROM {schema}.subscription o WHERE o.space = v_principal OFFSET v_skip LIMIT 1;
    END CASE;
    RETURN NOT FOUND;
END
$$;

-- Internal: raises DD007 unless the caller may have so many rows more.  Nothing has been written yet.
CREATE FUNCTION {schema}.check_room(p_what text, p_items int, p_of uuid DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT {schema}.has_room(session_user, p_what, p_items, p_of) THEN
        RAISE EXCEPTION 'max_live: this login has as many of % as it may', p_what
        USING ERRCODE = 'DD007', HINT = 'Wait until some are done, or let an administrator raise max_live.';
    END IF;
END
$$;
