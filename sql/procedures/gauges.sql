-- What the exporter shows of a namespace, in one look.  For monitors.
--
-- A look is bounded, whatever there is: of messages and of dead letters it reads at most p_most rows of a kind on a stream
-- (and past those that are leased), and 20 times as many on all streams, along the indexes; of runs, p_most of a status.
-- Where there are more, it estimates from a sample of some 500 pages of the table.

-- Answers rows of (what, of which stream (or role, status, table, state), of which kind, how much).
-- p_most: how many rows are counted before it estimates; at most 10,000.
CREATE FUNCTION {schema}.read_gauges(p_most int)
RETURNS TABLE (metric text, name text, kind text, value double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_most int := least(greatest(p_most, 1), 10000);
    v_budget int := v_most * 20;
    v_stream record;
    v_priority int;
    v_priorities int;
    v_left int;
    v_rows bigint;
    v_timers bigint;
    v_due timestamptz;
    v_ready bigint;
    v_overdue bigint;
    v_held int;
    v_read bigint;
    v_full boolean;
    v_delayed bigint;
    v_oldest timestamptz;
    v_timer timestamptz;
    v_deadline timestamptz;
    v_tick timestamptz;
    v_share real;
    v_sample json;
    v_status text;
    v_seen bigint;
BEGIN
    PERFORM {schema}.require_monitor();

    -- Streams.  Of a table of any size at most some 500 pages are read.
    v_share := least(100, 100 * 500 / greatest(pg_relation_size('{schema}.message') / 8192, 1)::double precision);
    SELECT least(coalesce(sum(cardinality(w.held)), 0), v_budget) INTO v_held FROM {schema}.worker w;
    FOR v_stream IN SELECT s.stream_id, s.name, s.paused FROM {schema}.stream s ORDER BY s.name LOOP
        v_ready := 0; v_overdue := 0; v_delayed := 0; v_oldest := NULL; v_priorities := 0; v_full := false;
        v_timer := NULL; v_deadline := NULL; v_tick := NULL;
        SELECT m.priority INTO v_priority FROM {schema}.message m
        WHERE m.stream_id = v_stream.stream_id ORDER BY m.priority LIMIT 1;
        WHILE v_priority IS NOT NULL AND v_priorities < 100 LOOP
            v_priorities := v_priorities + 1;
            -- The oldest comes first, past what is leased: it is known also where there are too many to count.  Ticks of
            -- schedules and limits of runs and activities (alarms) have priorities of their own, as a rule: where there are
            -- thousands of them and nothing else, nothing else is looked for.
            v_left := greatest(least(v_most - v_ready, v_budget), 1) + v_held;
            SELECT count(*), count(*) FILTER (WHERE c.shown), count(*) FILTER (WHERE c.shown AND c.kind = 'w'),
                   min(c.due_at) FILTER (WHERE c.shown), least(v_timer, min(c.due_at) FILTER (WHERE c.shown AND c.kind = 'w')),
                   least(v_tick, min(c.due_at) FILTER (WHERE c.free AND c.kind = 'c')),
                   least(v_deadline, min(c.due_at) FILTER (WHERE c.free AND c.kind IN ('d', 'e')))
            INTO v_read, v_rows, v_timers, v_due, v_timer, v_tick, v_deadline
            FROM (SELECT m.kind, m.due_at, m.lease_token IS NULL AS free,
                         m.lease_token IS NULL AND m.kind NOT IN ('c', 'd', 'e') AS shown
                  FROM {schema}.message m
                  WHERE m.stream_id = v_stream.stream_id AND m.priority = v_priority AND m.due_at <= v_now
                  ORDER BY m.due_at LIMIT v_left) c;
            v_ready := v_ready + v_rows; v_overdue := v_overdue + v_timers; v_oldest := least(v_oldest, v_due);
            v_budget := v_budget - v_read;
            v_full := v_full OR v_read >= v_left AND v_rows > 0;
            v_left := greatest(least(v_most - v_delayed, v_budget), 1);
            SELECT count(*), count(*) FILTER (WHERE c.shown) INTO v_read, v_rows
            FROM (SELECT m.lease_token IS NULL AND m.kind NOT IN ('c', 'd', 'e') AS shown
                  FROM {schema}.message m
                  WHERE m.stream_id = v_stream.stream_id AND m.priority = v_priority AND m.due_at > v_now
                  ORDER BY m.due_at LIMIT v_left) c;
            v_delayed := v_delayed + v_rows;
            v_budget := v_budget - v_read;
            v_full := v_full OR v_read >= v_left AND v_rows > 0;
            SELECT m.priority INTO v_priority FROM {schema}.message m
            WHERE m.stream_id = v_stream.stream_id AND m.priority > v_priority ORDER BY m.priority LIMIT 1;
        END LOOP;
        IF v_full OR v_priority IS NOT NULL THEN
            IF v_sample IS NULL THEN
                SELECT coalesce(json_object_agg(c.stream_id || c.state, c.rows * 100 / v_share), '{}') INTO v_sample
                FROM (SELECT m.stream_id, CASE WHEN m.due_at <= v_now THEN 'r' ELSE 'd' END AS state, count(*) AS rows
                      FROM {schema}.message m TABLESAMPLE SYSTEM (v_share) REPEATABLE (1)
                      WHERE m.lease_token IS NULL AND m.kind NOT IN ('c', 'd', 'e') GROUP BY 1, 2) c;
            END IF;
            v_ready := greatest(v_ready, (v_sample ->> (v_stream.stream_id || 'r'))::double precision);
            v_delayed := greatest(v_delayed, (v_sample ->> (v_stream.stream_id || 'd'))::double precision);
        END IF;
        RETURN QUERY
            SELECT 'overdue_seconds', v_stream.name, g.kind, coalesce(date_part('epoch', v_now - g.since), 0)
            FROM (VALUES ('timer', v_timer), ('deadline', v_deadline), ('schedule', v_tick)) g (kind, since)
            UNION ALL
            SELECT g.metric, v_stream.name, NULL::text, g.value::double precision
            FROM (VALUES ('stream_ready_messages', v_ready), ('stream_delayed_messages', v_delayed),
                         ('timers_overdue', v_overdue), ('stream_paused', v_stream.paused::int),
                         ('stream_oldest_ready_seconds', coalesce(date_part('epoch', v_now - v_oldest), 0)),
                         ('stream_workers', {schema}.live_workers(v_stream.stream_id))) g (metric, value);
    END LOOP;
    -- What workers hold is found by what they say that they hold: of each, the 10,000 that it was handed last.
    RETURN QUERY
        SELECT 'stream_leased_messages', s.name, NULL::text, coalesce(h.rows, 0)::double precision
        FROM {schema}.stream s LEFT JOIN (
            SELECT m.stream_id, count(DISTINCT h.message_id) AS rows
            FROM {schema}.worker w, unnest(w.held[greatest(cardinality(w.held) - 10000, 0) + 1:]) h (message_id)
            JOIN LATERAL (SELECT m.stream_id, m.worker_id FROM {schema}.message m WHERE m.message_id = h.message_id) m ON true
            WHERE m.worker_id = w.worker_id GROUP BY m.stream_id) h ON h.stream_id = s.stream_id;
    -- Dead letters: the latest by reason, and in proportion where there are more.
    v_share := least(100, 100 * 500 / greatest(pg_relation_size('{schema}.dead_letter') / 8192, 1)::double precision);
    v_sample := NULL;
    v_budget := v_most * 20;
    FOR v_stream IN SELECT s.stream_id, s.name FROM {schema}.stream s LOOP
        SELECT count(*) INTO v_seen
        FROM (SELECT 1 FROM {schema}.dead_letter d WHERE d.stream_id = v_stream.stream_id LIMIT greatest(least(v_most, v_budget), 1)) c;
        v_budget := v_budget - v_seen;
        CONTINUE WHEN v_seen = 0;
        v_rows := v_seen;
        IF v_seen >= v_most OR v_budget <= 0 THEN
            IF v_sample IS NULL THEN
                SELECT coalesce(json_object_agg(c.stream_id, c.rows * 100 / v_share), '{}') INTO v_sample
                FROM (SELECT d.stream_id, count(*) AS rows
                      FROM {schema}.dead_letter d TABLESAMPLE SYSTEM (v_share) REPEATABLE (1) GROUP BY 1) c;
            END IF;
            v_rows := greatest(v_seen, (v_sample ->> v_stream.stream_id::text)::double precision);
        END IF;
        RETURN QUERY
            SELECT 'stream_dead_letters', v_stream.name, c.reason, round(count(*) * v_rows::double precision / v_seen)
            FROM (SELECT d.reason FROM {schema}.dead_letter d WHERE d.stream_id = v_stream.stream_id
                  ORDER BY d.died_at DESC LIMIT v_seen) c GROUP BY c.reason;
    END LOOP;

    -- Runs.
    v_share := least(100, 100 * 500 / greatest(pg_relation_size('{schema}.run') / 8192, 1)::double precision);
    v_sample := NULL;
    FOREACH v_status IN ARRAY '{running,completed,failed,cancelled,terminated,timed_out,continued_as_new}'::text[] LOOP
        SELECT count(*) INTO v_rows
        FROM (SELECT 1 FROM {schema}.run r WHERE r.status = v_status LIMIT v_most) c;
        IF v_rows >= v_most THEN
            IF v_sample IS NULL THEN
                SELECT coalesce(json_object_agg(c.status, c.rows * 100 / v_share), '{}') INTO v_sample
                FROM (SELECT r.status, count(*) AS rows
                      FROM {schema}.run r TABLESAMPLE SYSTEM (v_share) REPEATABLE (1) GROUP BY 1) c;
            END IF;
            v_rows := greatest(v_rows, (v_sample ->> v_status)::double precision);
        END IF;
        RETURN QUERY SELECT 'workflow_runs', v_status, NULL::text, v_rows::double precision;
    END LOOP;
    RETURN QUERY
        WITH open AS MATERIALIZED (
            SELECT e.role, e.opened_at, CASE WHEN e.claimed_until > v_now THEN 'claimed' ELSE 'waiting' END AS state
            FROM {schema}.escalation e WHERE e.status = 'open' ORDER BY e.priority, e.opened_at LIMIT v_most)
        SELECT 'escalations', o.role, o.state, count(*)::double precision FROM open o GROUP BY o.role, o.state
        UNION ALL
        SELECT 'escalation_oldest_waiting_seconds', o.role, NULL, date_part('epoch', v_now - min(o.opened_at))
        FROM open o WHERE o.state = 'waiting' GROUP BY o.role;

    RETURN QUERY
        WITH known AS MATERIALIZED (
            SELECT CASE WHEN NOT s.paused THEN 'active' WHEN s.failure IS NULL THEN 'paused' ELSE 'stopped' END AS state
            FROM {schema}.schedule s LIMIT v_most)
        SELECT 'schedules', s.state, NULL::text, (SELECT count(*) FROM known k WHERE k.state = s.state)::double precision
        FROM (VALUES ('active'), ('paused'), ('stopped')) s (state);

    -- Workers.
    RETURN QUERY
        WITH seen AS (
            SELECT w.threads, CASE WHEN w.beat_at + w.reclaim_delay < v_now THEN 'silent' ELSE 'live' END AS state
            FROM {schema}.worker w)
        SELECT 'workers', s.state, NULL::text, (SELECT count(*) FROM seen w WHERE w.state = s.state)::double precision
        FROM (VALUES ('live'), ('silent')) s (state)
        UNION ALL
        SELECT 'worker_threads', NULL, NULL, coalesce(sum(w.threads), 0)::double precision FROM seen w WHERE w.state = 'live'
        UNION ALL
        SELECT 'watchdog_last_look_seconds', NULL, NULL, date_part('epoch', v_now - d.looked_at) FROM {schema}.watchdog d;
    -- A worker's logins come and go: it can work for as long as the last of them lives.
    RETURN QUERY
        SELECT 'login_expires_seconds', NULL::text, NULL::text, date_part('epoch', min(w.over) - v_now)
        FROM (SELECT max(coalesce(l.expires_at, 'infinity')) AS over FROM {schema}.login l
              WHERE l.provisioned GROUP BY l.principal_id) w
        WHERE w.over > v_now - interval '1 day' AND w.over < 'infinity' HAVING count(*) > 0;

    -- Postgres.
    RETURN QUERY
        SELECT g.metric, c.relname::text, NULL::text, g.value::double precision
        FROM pg_class c, LATERAL (VALUES
            ('table_bytes', pg_total_relation_size(c.oid)), ('table_live_rows', pg_stat_get_live_tuples(c.oid)),
            ('table_dead_rows', pg_stat_get_dead_tuples(c.oid))) g (metric, value)
        WHERE c.relnamespace = '{schema}'::regnamespace AND c.relkind = 'r';
    -- A transaction in this database, a replica, a prepared transaction.
    RETURN QUERY
        WITH sessions AS MATERIALIZED (
            SELECT a.xact_start, greatest(age(a.backend_xmin), age(a.backend_xid)) AS age, a.query = '<insufficient privilege>' AS unseen
            FROM pg_stat_activity a
            WHERE coalesce(a.datname = current_database(), true) AND a.pid <> pg_backend_pid()
              -- A VACUUM holds no other one up, and takes hours where a table is large.
              AND NOT EXISTS (SELECT 1 FROM pg_stat_progress_vacuum v WHERE v.pid = a.pid))
        SELECT 'oldest_xmin_age_transactions', NULL::text, NULL::text, greatest(
                   0, (SELECT max(s.age) FROM sessions s),
                   (SELECT max(greatest(age(r.xmin), age(r.catalog_xmin))) FROM pg_replication_slots r),
                   (SELECT max(age(x.transaction)) FROM pg_prepared_xacts x),
                   -- What sessions that are not seen have written, of whatever database.
                   CASE WHEN EXISTS (SELECT 1 FROM sessions s WHERE s.unseen) THEN
                       age(pg_snapshot_xmin(pg_current_snapshot())::xid) END)::double precision
        UNION ALL
        SELECT 'oldest_transaction_seconds', NULL, NULL, coalesce(date_part('epoch', v_now - min(s.xact_start)), 0) FROM sessions s
        UNION ALL
        SELECT 'unseen_sessions', NULL, NULL, count(*)::double precision FROM sessions s WHERE s.unseen
        UNION ALL
        SELECT 'notification_queue_ratio', NULL, NULL, pg_notification_queue_usage();
END
$$;
