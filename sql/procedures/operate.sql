-- For operators: look into streams, pause and purge them, and bring dead letters back.  Administrators only.
--
-- What may concern a million rows is done in calls of bounded size, each a transaction of its own, that go on where the
-- last one ended.  Their plans are made for the filters at hand.

-- Internal: the id of a stream.  Raises DD001 with its name where there is none: administrators may know.
CREATE FUNCTION {schema}.stream_named(p_name text)
RETURNS int
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_stream int;
BEGIN
    PERFORM {schema}.require_admin();
    SELECT s.stream_id INTO v_stream FROM {schema}.stream s WHERE s.name = p_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no stream named "%"', p_name USING ERRCODE = 'DD001';
    END IF;
    RETURN v_stream;
END
$$;

-- A paused stream hands out nothing; what runs goes on.  Resumed, it wakes those who wait for it.
-- Answers whether that changed anything.
CREATE FUNCTION {schema}.pause_stream(p_stream text, p_paused boolean)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_stream int := {schema}.stream_named(p_stream);
BEGIN
    UPDATE {schema}.stream s SET paused = p_paused WHERE s.stream_id = v_stream AND s.paused <> p_paused;
    IF FOUND AND NOT p_paused THEN
        PERFORM {schema}.wake(ARRAY[v_stream]);
    END IF;
    RETURN FOUND;
END
$$;

-- Messages of a stream, in the order in which they are handed out; NULL filters match all.
-- Ticks of schedules are none.  state: waiting, delayed or leased; leased ones with their worker, and since when it runs
-- them, where that is known.
CREATE FUNCTION {schema}.peek_messages(p_stream text, p_state text, p_actor text, p_limit int)
RETURNS TABLE (
    message_id uuid, state text, actor text, kind text, run_id uuid, priority int, due_at timestamptz, enqueued_at timestamptz,
    attempt int, deaths smallint, worker_id bigint, host text, pid int, since timestamptz, abort_at timestamptz,
    unique_key text, last_failure text, payload bytea)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_stream int := {schema}.stream_named(p_stream);
    v_now timestamptz := clock_timestamp();
BEGIN
    RETURN QUERY
        SELECT m.message_id,
               CASE WHEN m.lease_token IS NOT NULL THEN 'leased' WHEN m.due_at > v_now THEN 'delayed' ELSE 'waiting' END,
               m.actor, m.kind::text, m.run_id, m.priority, m.due_at, m.enqueued_at, m.attempt, m.deaths,
               m.worker_id, w.host, w.pid, w.running_since[array_position(w.running, m.message_id)], m.abort_at,
               m.unique_key, m.last_failure, m.payload
        FROM {schema}.message m LEFT JOIN {schema}.worker w ON w.worker_id = m.worker_id
        WHERE m.stream_id = v_stream AND m.kind NOT IN ('c', 'd', 'e') AND (p_actor IS NULL OR m.actor = p_actor)
          AND (p_state IS NULL OR p_state = 'leased' AND m.lease_token IS NOT NULL
               OR p_state = 'delayed' AND m.lease_token IS NULL AND m.due_at > v_now
               OR p_state = 'waiting' AND m.lease_token IS NULL AND m.due_at <= v_now)
        ORDER BY m.priority, m.due_at LIMIT least(p_limit, 10000);
END
$$;

-- What a worker has leased, and since when it runs it, where that is known.
CREATE FUNCTION {schema}.worker_messages(p_worker bigint)
RETURNS TABLE (message_id uuid, stream text, actor text, kind text, run_id uuid, attempt int, since timestamptz, abort_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_admin();
    RETURN QUERY
        SELECT m.message_id, s.name, m.actor, m.kind::text, m.run_id, m.attempt,
               w.running_since[array_position(w.running, m.message_id)] AS began, m.abort_at
        FROM {schema}.worker w JOIN {schema}.message m ON m.message_id = ANY (w.held) AND m.worker_id = w.worker_id
        JOIN {schema}.stream s ON s.stream_id = m.stream_id
        WHERE w.worker_id = p_worker ORDER BY began, m.message_id LIMIT 10000;
END
$$;

-- What a purge of this stream would drop, by actor, and the time that it goes up to.
CREATE FUNCTION {schema}.count_waiting(p_stream text, p_actor text)
RETURNS TABLE (actor text, messages bigint, until timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_stream int := {schema}.stream_named(p_stream);
BEGIN
    RETURN QUERY
        SELECT m.actor, count(*), clock_timestamp() FROM {schema}.message m
        WHERE m.stream_id = v_stream AND m.kind IN ('m', 'j') AND m.lease_token IS NULL AND (p_actor IS NULL OR m.actor = p_actor)
        GROUP BY m.actor ORDER BY m.actor;
END
$$;

-- Drop at most p_limit messages of a stream: not what is leased or belongs to a run, nor what was enqueued after p_until.
-- Answers how many it dropped.
CREATE FUNCTION {schema}.purge_messages(p_stream text, p_actor text, p_until timestamptz, p_limit int)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET plan_cache_mode = force_custom_plan SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
    v_stream int := {schema}.stream_named(p_stream);
    v_count bigint;
BEGIN
    WITH c AS MATERIALIZED (
        SELECT m.ctid AS tid FROM {schema}.message m
        WHERE m.stream_id = v_stream AND m.kind IN ('m', 'j') AND m.lease_token IS NULL AND m.enqueued_at <= p_until
          AND (p_actor IS NULL OR m.actor = p_actor)
        LIMIT least(p_limit, 10000)
        FOR UPDATE SKIP LOCKED)
    DELETE FROM {schema}.message m USING c WHERE m.ctid = c.tid;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END
$$;

-- Dead letters ------------------------------------------------------------------------------------------------------

-- Internal: the numbers of dead letters, newest or oldest first, above p_above and up to p_upto.  NULL filters match
-- all; p_letters and p_messages together name some.  p_text: anywhere in the failure, capitals or not.
-- The settings are not those of its callers, who know what they look for.
CREATE FUNCTION {schema}.match_dead_letters(
    p_letters bigint[], p_messages uuid[], p_stream text, p_actor text, p_reason text, p_after timestamptz, p_before timestamptz,
    p_text text, p_above bigint, p_upto bigint, p_limit int, p_newest boolean)
RETURNS SETOF bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET enable_seqscan = on SET enable_bitmapscan = on
AS $$
DECLARE
    v_stream int;
BEGIN
    PERFORM {schema}.require_admin();
    SELECT s.stream_id INTO v_stream FROM {schema}.stream s WHERE s.name = p_stream;
    IF p_stream IS NOT NULL AND v_stream IS NULL THEN
        RETURN;
    END IF;
    IF p_newest THEN
        RETURN QUERY
            SELECT d.dead_letter_id FROM {schema}.dead_letter d
            WHERE (p_letters IS NULL AND p_messages IS NULL OR d.dead_letter_id = ANY (p_letters) OR d.message_id = ANY (p_messages))
              AND (v_stream IS NULL OR d.stream_id = v_stream) AND (p_actor IS NULL OR d.actor = p_actor)
              AND (p_reason IS NULL OR d.reason = p_reason)
              AND (p_after IS NULL OR d.died_at >= p_after) AND (p_before IS NULL OR d.died_at < p_before)
              AND (p_text IS NULL OR position(lower(p_text) IN lower(d.failure)) > 0)
              AND (p_upto IS NULL OR d.dead_letter_id <= p_upto)
            ORDER BY d.dead_letter_id DESC LIMIT p_limit;
    ELSE
        RETURN QUERY
            SELECT d.dead_letter_id FROM {schema}.dead_letter d
            WHERE (p_letters IS NULL AND p_messages IS NULL OR d.dead_letter_id = ANY (p_letters) OR d.message_id = ANY (p_messages))
              AND (v_stream IS NULL OR d.stream_id = v_stream) AND (p_actor IS NULL OR d.actor = p_actor)
              AND (p_reason IS NULL OR d.reason = p_reason)
              AND (p_after IS NULL OR d.died_at >= p_after) AND (p_before IS NULL OR d.died_at < p_before)
              AND (p_text IS NULL OR position(lower(p_text) IN lower(d.failure)) > 0)
              AND d.dead_letter_id > p_above AND d.dead_letter_id <= p_upto
            ORDER BY d.dead_letter_id LIMIT p_limit;
    END IF;
END
$$;

-- Dead letters, newest first; those numbered below p_below, which is how a page follows another.
CREATE FUNCTION {schema}.list_dead_letters(
    p_letters bigint[], p_messages uuid[], p_stream text, p_actor text, p_reason text, p_after timestamptz, p_before timestamptz,
    p_text text, p_limit int, p_below bigint DEFAULT NULL)
RETURNS TABLE (
    dead_letter_id bigint, message_id uuid, stream text, actor text, reason text, failure text, attempt int, deaths smallint,
    priority int, kind text, unique_key text, group_id uuid, enqueued_at timestamptz, died_at timestamptz, payload bytea)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    RETURN QUERY
        SELECT d.dead_letter_id, d.message_id, s.name, d.actor, d.reason, d.failure, d.attempt, d.deaths,
               d.priority, d.kind::text, d.unique_key, d.group_id, d.enqueued_at, d.died_at, d.payload
        FROM {schema}.match_dead_letters(
            p_letters, p_messages, p_stream, p_actor, p_reason, p_after, p_before, p_text, NULL, p_below - 1, least(p_limit, 10000), true) l (id)
        JOIN {schema}.dead_letter d ON d.dead_letter_id = l.id JOIN {schema}.stream s ON s.stream_id = d.stream_id
        ORDER BY d.dead_letter_id DESC;
END
$$;

-- How many dead letters there are, by stream, actor and reason; and the highest number of each kind.
CREATE FUNCTION {schema}.count_dead_letters(
    p_letters bigint[], p_messages uuid[], p_stream text, p_actor text, p_reason text, p_after timestamptz, p_before timestamptz,
    p_text text, p_limit int)
RETURNS TABLE (stream text, actor text, reason text, letters bigint, last bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    RETURN QUERY
        SELECT s.name, d.actor, d.reason, count(*), max(d.dead_letter_id)
        FROM {schema}.match_dead_letters(
            p_letters, p_messages, p_stream, p_actor, p_reason, p_after, p_before, p_text, 0, 9223372036854775807, p_limit, false) l (id)
        JOIN {schema}.dead_letter d ON d.dead_letter_id = l.id JOIN {schema}.stream s ON s.stream_id = d.stream_id
        GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;
END
$$;

-- Bring dead letters back as messages, oldest first: same id, payload, kind, group, key and priority; the attempts go on
-- counting and the last failure stays to be seen; due now, no poison at once, and with all their retries before them.
-- A letter whose id or unique key a live message has stays where it is.
-- Answers how many it looked at (fewer than p_limit: that was the end), how many came back, the last number it looked
-- at, and the numbers of those that stay.
CREATE FUNCTION {schema}.redrive_dead_letters(
    p_letters bigint[], p_messages uuid[], p_stream text, p_actor text, p_reason text, p_after timestamptz, p_before timestamptz,
    p_text text, p_above bigint, p_upto bigint, p_limit int)
RETURNS TABLE (matched int, redriven int, last bigint, kept bigint[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_matched bigint[];
    v_letters bigint[];
    v_back bigint[];
    v_streams int[];
    v_now timestamptz := clock_timestamp();
BEGIN
    v_matched := ARRAY(SELECT l.id FROM {schema}.match_dead_letters(
        p_letters, p_messages, p_stream, p_actor, p_reason, p_after, p_before, p_text, p_above, p_upto,
        least(p_limit, 10000), false) l (id));
    -- What another operator redrives or drops in this moment is his.
    v_letters := ARRAY(SELECT d.dead_letter_id FROM {schema}.dead_letter d WHERE d.dead_letter_id = ANY (v_matched)
                       ORDER BY d.dead_letter_id FOR UPDATE SKIP LOCKED);
    WITH letters AS (
        SELECT DISTINCT ON (d.message_id, d.stream_id) d.* FROM {schema}.dead_letter d
        WHERE d.dead_letter_id = ANY (v_letters) ORDER BY d.message_id, d.stream_id, d.dead_letter_id),
    back AS (
        INSERT INTO {schema}.message (
            message_id, stream_id, priority, due_at, enqueued_at, attempt, reclaimed, redriven, kind, actor, last_failure, payload,
            group_id, unique_key)
        SELECT l.message_id, l.stream_id, l.priority, v_now + row_number() OVER (ORDER BY l.dead_letter_id) * interval '1 microsecond',
               l.enqueued_at, l.attempt + 1, true, true, l.kind, l.actor, l.failure, l.payload,
               l.group_id, l.unique_key
        FROM letters l ORDER BY l.dead_letter_id
        ON CONFLICT DO NOTHING
        RETURNING message_id, stream_id),
    gone AS (
        DELETE FROM {schema}.dead_letter d
        USING letters l JOIN back b ON b.message_id = l.message_id AND b.stream_id = l.stream_id
        WHERE d.dead_letter_id = l.dead_letter_id RETURNING d.dead_letter_id, d.stream_id)
    SELECT coalesce(array_agg(g.dead_letter_id), '{}'), array_agg(DISTINCT g.stream_id) INTO v_back, v_streams FROM gone g;
    IF v_streams IS NOT NULL THEN
        PERFORM {schema}.wake(v_streams);
    END IF;
    RETURN QUERY SELECT cardinality(v_matched), cardinality(v_back), v_matched[cardinality(v_matched)],
                        ARRAY(SELECT k FROM unnest(v_letters) k WHERE NOT k = ANY (v_back) ORDER BY k);
END
$$;

-- Drop dead letters, oldest first.  Answers how many it looked at (fewer than p_limit: that was the end), how many it
-- dropped, and the last number it looked at.
CREATE FUNCTION {schema}.drop_dead_letters(
    p_letters bigint[], p_messages uuid[], p_stream text, p_actor text, p_reason text, p_after timestamptz, p_before timestamptz,
    p_text text, p_above bigint, p_upto bigint, p_limit int)
RETURNS TABLE (matched int, dropped int, last bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_matched bigint[];
    v_dropped int;
BEGIN
    v_matched := ARRAY(SELECT l.id FROM {schema}.match_dead_letters(
        p_letters, p_messages, p_stream, p_actor, p_reason, p_after, p_before, p_text, p_above, p_upto,
        least(p_limit, 10000), false) l (id));
    DELETE FROM {schema}.dead_letter d WHERE d.dead_letter_id = ANY (v_matched);
    GET DIAGNOSTICS v_dropped = ROW_COUNT;
    RETURN QUERY SELECT cardinality(v_matched), v_dropped, v_matched[cardinality(v_matched)];
END
$$;
