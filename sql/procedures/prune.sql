-- Pruning: what is over for long is forgotten.  Administrators only, but for what a worker's sweep forgets by itself.
--
-- Each call is a transaction of bounded size that waits for nobody's lock.

-- How many rows a prune would forget: closed runs (with their histories) and dead letters that are older than these ages
-- (NULL: none), and what has expired.  kept: runs that are old enough, and are needed by their parent or a child.
-- Answers as well the times that the ages reach back to.
CREATE FUNCTION {schema}.count_prunable(p_runs interval, p_letters interval)
RETURNS TABLE (
    runs bigint, kept bigint, dead_letters bigint, results bigint, waiters bigint, limiters bigint, senders bigint,
    runs_before timestamptz, letters_before timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    PERFORM {schema}.require_admin();
    runs_before := v_now - p_runs;
    letters_before := v_now - p_letters;
    SELECT count(*) FILTER (WHERE {schema}.is_prunable(r.run_id, r.parent_run_id)), count(*) INTO runs, kept
    FROM {schema}.run r WHERE r.closed_at < runs_before;
    kept := kept - runs;
    SELECT count(*) INTO dead_letters FROM {schema}.dead_letter d WHERE d.died_at < letters_before;
    SELECT count(*) INTO results FROM {schema}.result o WHERE o.expires_at < v_now;
    waiters := (SELECT count(*) FROM {schema}.result_waiter o WHERE o.until < v_now)
               + (SELECT count(*) FROM {schema}.waiter o WHERE o.until < v_now)
               + (SELECT count(*) FROM {schema}.update_waiter o WHERE o.until < v_now)
               + (SELECT count(*) FROM {schema}.run_query o WHERE o.until < v_now);
    SELECT count(*) INTO limiters FROM {schema}.limiter o WHERE {schema}.limiter_is_over(o.key, o.expires_at, v_now);
    SELECT count(*) INTO senders FROM {schema}.sender o WHERE o.at < v_now - interval '7 days';
    RETURN NEXT;
END
$$;

-- Internal: whether a closed run may be forgotten.  A parent that runs, and is loaded again, meets the children that its
-- history has started; and a child that runs has its parent's workflow id from the parent's row.  The first of runs that
-- follow each other is needed by the live one: what was signalled under an id is kept with it.
CREATE FUNCTION {schema}.is_prunable(p_run uuid, p_parent uuid)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
BEGIN
    RETURN NOT EXISTS (SELECT 1 FROM {schema}.run p WHERE p.run_id = p_parent AND p.status = 'running')
           AND NOT EXISTS (SELECT 1 FROM {schema}.run c WHERE c.parent_run_id = p_run AND c.status = 'running')
           AND NOT EXISTS (SELECT 1 FROM {schema}.run r JOIN {schema}.run l ON l.workflow_id = r.workflow_id
                           AND l.stream_id = r.stream_id AND l.status = 'running' AND l.first_run_id = p_run
                           WHERE r.run_id = p_run AND r.next_run_id IS NOT NULL)
           -- What it has emitted is read from its history.
           AND NOT EXISTS (SELECT 1 FROM {schema}.subscription s
                           JOIN {schema}.topic_event t ON t.subscription_id = s.subscription_id AND t.run_id = p_run);
END
$$;

-- Forget runs that closed before a time, oldest first, with all that is theirs: at most p_limit, fewer where their
-- histories are long.  p_closed, p_run: the last run that the call before looked at; NULL for the first.
-- Answers how many runs and events it forgot, the last run that it looked at, and whether there may be more.
CREATE FUNCTION {schema}.prune_runs(p_before timestamptz, p_closed timestamptz, p_run uuid, p_limit int)
RETURNS TABLE (runs bigint, events bigint, last_closed timestamptz, last_run uuid, more boolean)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_row record;
    v_gone uuid[] := '{}';
    v_looked int := 0;
    v_limit int := least(greatest(p_limit, 1), 1000);
BEGIN
    PERFORM {schema}.require_admin();
    events := 0;
    more := false;
    FOR v_row IN
        SELECT r.run_id, r.closed_at, r.parent_run_id, r.last_event FROM {schema}.run r
        WHERE r.closed_at < p_before
          AND (r.closed_at, r.run_id) > (coalesce(p_closed, '-infinity'), coalesce(p_run, '00000000-0000-0000-0000-000000000000'))
        ORDER BY r.closed_at, r.run_id LIMIT v_limit
    LOOP
        v_looked := v_looked + 1;
        last_closed := v_row.closed_at;
        last_run := v_row.run_id;
        more := v_looked = v_limit;
        CONTINUE WHEN NOT {schema}.is_prunable(v_row.run_id, v_row.parent_run_id);
        PERFORM 1 FROM {schema}.run r WHERE r.run_id = v_row.run_id FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        v_gone := v_gone || v_row.run_id;
        events := events + v_row.last_event;
        IF events >= 20000 THEN
            more := true;
            EXIT;
        END IF;
    END LOOP;
    DELETE FROM {schema}.event e USING unnest(v_gone) g (id) WHERE e.run_id = g.id;
    GET DIAGNOSTICS events = ROW_COUNT;
    DELETE FROM {schema}.inbox i USING unnest(v_gone) g (id) WHERE i.run_id = g.id;
    DELETE FROM {schema}.signal_key k USING unnest(v_gone) g (id) WHERE k.run_id = g.id;
    DELETE FROM {schema}.escalation o USING unnest(v_gone) g (id) WHERE o.run_id = g.id;
    DELETE FROM {schema}.waiter w USING unnest(v_gone) g (id) WHERE w.run_id = g.id;
    DELETE FROM {schema}.run_update u USING unnest(v_gone) g (id) WHERE u.run_id = g.id;
    DELETE FROM {schema}.update_waiter w USING unnest(v_gone) g (id) WHERE w.chain_id = g.id;
    DELETE FROM {schema}.run_state t USING unnest(v_gone) g (id) WHERE t.run_id = g.id;
    DELETE FROM {schema}.run r USING unnest(v_gone) g (id) WHERE r.run_id = g.id;
    GET DIAGNOSTICS runs = ROW_COUNT;
    RETURN NEXT;
END
$$;

-- Drop at most p_limit dead letters that died before a time.  Answers how many: fewer than p_limit were the last.
CREATE FUNCTION {schema}.prune_dead_letters(p_before timestamptz, p_limit int)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
    v_limit int := least(greatest(p_limit, 1), 10000);
    v_stream int;
    v_rows bigint;
    v_all bigint := 0;
BEGIN
    PERFORM {schema}.require_admin();
    FOR v_stream IN SELECT s.stream_id FROM {schema}.stream s LOOP
        DELETE FROM {schema}.dead_letter d WHERE d.ctid = ANY (ARRAY(
            SELECT o.ctid FROM {schema}.dead_letter o WHERE o.stream_id = v_stream AND o.died_at < p_before
            ORDER BY o.died_at LIMIT v_limit - v_all FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS v_rows = ROW_COUNT;
        v_all := v_all + v_rows;
        EXIT WHEN v_all >= v_limit;
    END LOOP;
    RETURN v_all;
END
$$;

-- Forget what has expired: results, and of the other tables their p_window-th piece.  Answers how many rows (5000 or more:
-- call again), and how many pieces the largest table has.
CREATE FUNCTION {schema}.prune_expired(p_window bigint)
RETURNS TABLE (results bigint, waiters bigint, limiters bigint, senders bigint, windows bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
BEGIN
    PERFORM {schema}.require_admin();
    RETURN QUERY SELECT f.* FROM {schema}.forget_expired(0, true, p_window) f;
END
$$;

-- Forget what has expired, a bounded number of rows of each kind; nobody is waited for.  Answers how many rows.
-- Each call looks at some piece of the larger tables.
-- Whoever keeps this transaction open stands in the way of those who come back to what it forgets: a worker that is no
-- administrator's forgets what is its principal's own, and of the others only what has been over for a month.
CREATE FUNCTION {schema}.sweep(p_worker uuid)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    v_worker record;
BEGIN
    SELECT * INTO v_worker FROM {schema}.authenticate(p_worker);
    RETURN (SELECT f.results + f.waiters + f.limiters + f.senders
            FROM {schema}.forget_expired(v_worker.principal_id, v_worker.is_admin, floor(random() * 1000000000)::bigint) f);
END
$$;

-- Internal: whether a limiter's key may be forgotten.  A group may take longer than its barrier lives: its count, whose
-- key is a uuid, is kept for a week more.
CREATE FUNCTION {schema}.limiter_is_over(p_key text, p_expires_at timestamptz, p_now timestamptz)
RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN p_expires_at < p_now - CASE WHEN length(p_key) = 36 THEN interval '7 days' ELSE interval '1 hour' END;
END
$$;

-- Internal: a piece of 500 pages of a table.  What changes with every use (a sender's batch, a limiter's expiry) has no
-- index, so that these changes are HOT: who looks for what is over looks at a piece at a time.
CREATE FUNCTION {schema}.table_window(p_table text, p_window bigint, OUT low tid, OUT high tid, OUT windows bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_pages bigint := pg_relation_size(p_table::regclass) / (SELECT c.database_block_size FROM pg_control_init() c);
BEGIN
    windows := greatest((v_pages + 499) / 500, 1);
    low := format('(%s,0)', p_window % windows * 500)::tid;
    high := format('(%s,0)', (p_window % windows + 1) * 500)::tid;
END
$$;

-- Internal: what sweep and prune_expired say; without p_admin, what belongs to the caller and its principal.
CREATE FUNCTION {schema}.forget_expired(p_principal int, p_admin boolean, p_window bigint)
RETURNS TABLE (results bigint, waiters bigint, limiters bigint, senders bigint, windows bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_foreign timestamptz := v_now - CASE WHEN p_admin THEN interval '0' ELSE interval '30 days' END;
    v_streams int[];
    v_piece record;
BEGIN
    v_streams := ARRAY(SELECT g.stream_id FROM {schema}.stream_grant g
                       WHERE g.principal_id = p_principal AND g.consume) || -p_principal;
    DELETE FROM {schema}.result r WHERE r.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.result o
        WHERE o.expires_at < v_now AND (o.expires_at < v_foreign OR o.stream_id = ANY (v_streams))
        LIMIT 5000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS results = ROW_COUNT;

    v_piece := {schema}.table_window('{schema}.result_waiter', p_window);
    windows := v_piece.windows;
    DELETE FROM {schema}.result_waiter w WHERE w.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.result_waiter o
        WHERE o.ctid >= v_piece.low AND o.ctid < v_piece.high AND o.until < v_now LIMIT 5000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS waiters = ROW_COUNT;
    v_piece := {schema}.table_window('{schema}.waiter', p_window);
    windows := greatest(windows, v_piece.windows);
    DELETE FROM {schema}.waiter w WHERE w.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.waiter o
        WHERE o.ctid >= v_piece.low AND o.ctid < v_piece.high AND o.until < v_now LIMIT 5000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS limiters = ROW_COUNT;
    waiters := waiters + limiters;
    v_piece := {schema}.table_window('{schema}.update_waiter', p_window);
    windows := greatest(windows, v_piece.windows);
    DELETE FROM {schema}.update_waiter w WHERE w.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.update_waiter o
        WHERE o.ctid >= v_piece.low AND o.ctid < v_piece.high AND o.until < v_now LIMIT 5000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS limiters = ROW_COUNT;
    waiters := waiters + limiters;
    DELETE FROM {schema}.run_query q WHERE q.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.run_query o WHERE o.until < v_now LIMIT 5000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS limiters = ROW_COUNT;
    waiters := waiters + limiters;

    v_piece := {schema}.table_window('{schema}.limiter', p_window);
    windows := greatest(windows, v_piece.windows);
    DELETE FROM {schema}.limiter l WHERE l.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.limiter o
        WHERE o.ctid >= v_piece.low AND o.ctid < v_piece.high AND o.expires_at < v_now
          AND (o.expires_at < v_foreign OR o.space = p_principal)
          AND {schema}.limiter_is_over(o.key, o.expires_at, v_now)
        LIMIT 5000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS limiters = ROW_COUNT;

    -- A sender asks about its last batch within minutes, if ever.
    v_piece := {schema}.table_window('{schema}.sender', p_window);
    windows := greatest(windows, v_piece.windows);
    DELETE FROM {schema}.sender s WHERE s.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.sender o
        WHERE o.ctid >= v_piece.low AND o.ctid < v_piece.high
          AND o.at < v_now - interval '7 days' AND (o.at < v_foreign OR o.login = session_user)
        LIMIT 5000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS senders = ROW_COUNT;
    RETURN NEXT;
END
$$;
