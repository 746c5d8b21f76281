-- How fast the streams of a namespace move.  For monitors.
--
-- ended: how many messages a second the workers end, as they say in their heartbeats: of those whose last one is no older
--   than two of their intervals (see leases.py).
-- came: how many a second of those that came, for at once, in the last p_seconds (at most 3,600) are still there.  That is
--   what comes to a stream that has more than its workers can do, and less than that to any other.
-- Bounded: along the index, at most p_most (at most 10,000) of the latest of a stream and a priority, 20 times as many in
-- all, and 100 priorities of a stream.
CREATE FUNCTION {schema}.stream_rates(p_seconds double precision, p_most int)
RETURNS TABLE (name text, ended double precision, came double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET lock_timeout = '2s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_since timestamptz := v_now - least(greatest(p_seconds, 1), 3600) * interval '1 second';
    v_most int := least(greatest(p_most, 1), 10000);
    v_budget int := v_most * 20;
    v_stream record;
    v_priority int;
    v_priorities int;
    v_limit int;
    v_looked_at int;
    v_rows int;
    v_first timestamptz;
BEGIN
    PERFORM {schema}.require_monitor();
    FOR v_stream IN
        SELECT s.stream_id, s.name, coalesce(r.ended, 0) AS ended
        FROM {schema}.stream s LEFT JOIN (
            SELECT u.stream_id, sum(u.rate)::double precision AS ended
            FROM {schema}.worker w, unnest(w.stream_ids, w.rates) u (stream_id, rate)
            WHERE w.beat_at > v_now - least(w.reclaim_delay / 2, interval '10 seconds') AND u.rate IS NOT NULL
            GROUP BY u.stream_id) r ON r.stream_id = s.stream_id
        ORDER BY s.name
    LOOP
        came := 0; v_priorities := 0;
        SELECT m.priority INTO v_priority FROM {schema}.message m
        WHERE m.stream_id = v_stream.stream_id ORDER BY m.priority LIMIT 1;
        WHILE v_priority IS NOT NULL AND v_priorities < 100 AND v_budget > 0 LOOP
            v_priorities := v_priorities + 1;
            v_limit := least(v_most, v_budget);
            SELECT count(*), count(*) FILTER (WHERE c.enqueued_at > v_since AND c.kind NOT IN ('c', 'd', 'e')), min(c.due_at)
            INTO v_looked_at, v_rows, v_first
            FROM (SELECT m.due_at, m.enqueued_at, m.kind FROM {schema}.message m
                  WHERE m.stream_id = v_stream.stream_id AND m.priority = v_priority AND m.due_at <= v_now AND m.due_at > v_since
                  ORDER BY m.due_at DESC LIMIT v_limit) c;
            -- Where there are more than it looks at, they came in less time.
            came := came + v_rows / greatest(date_part('epoch', v_now - CASE WHEN v_looked_at < v_limit THEN v_since ELSE v_first END), 0.001);
            v_budget := v_budget - v_looked_at;
            SELECT m.priority INTO v_priority FROM {schema}.message m
            WHERE m.stream_id = v_stream.stream_id AND m.priority > v_priority ORDER BY m.priority LIMIT 1;
        END LOOP;
        name := v_stream.name; ended := v_stream.ended;
        RETURN NEXT;
    END LOOP;
END
$$;
