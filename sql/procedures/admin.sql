-- For operators: administrators only; what merely counts, also monitors.

-- Internal: raises DD001 unless the caller is an administrator.
CREATE FUNCTION {schema}.require_admin()
RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT (SELECT c.is_admin FROM {schema}.caller() c) THEN
        RAISE EXCEPTION 'this needs an administrator of the namespace' USING ERRCODE = 'DD001';
    END IF;
END
$$;

-- Internal: raises DD001 unless the caller is an administrator or a monitor.
CREATE FUNCTION {schema}.require_monitor()
RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM 1 FROM {schema}.login l JOIN {schema}.principal p ON p.principal_id = l.principal_id
    WHERE l.login = session_user AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp())
      AND (p.is_admin OR p.kind = 'monitor');
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this needs an administrator of the namespace, or a monitor' USING ERRCODE = 'DD001';
    END IF;
END
$$;

-- Give a login (not a stream's worker only: any existing role) its grants.  A principal may have several logins.
-- Only adds: an administrator who is granted a stream stays one, so that the last of them cannot shut himself out.
-- Raises DD010 for what was provisioned: a worker's role has what it was made with.
CREATE FUNCTION {schema}.grant_login(p_login text, p_principal text, p_admin boolean, p_consume text[], p_produce text[])
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_principal int;
BEGIN
    PERFORM {schema}.require_admin();
    IF EXISTS (SELECT 1 FROM {schema}.principal p WHERE p.kind <> 'application'
               AND (p.name = p_principal OR p.principal_id = (
                   SELECT l.principal_id FROM {schema}.login l WHERE l.login = p_login))) THEN
        RAISE EXCEPTION '% belongs to a worker that was provisioned', quote_literal(p_login) USING ERRCODE = 'DD010';
    END IF;
    INSERT INTO {schema}.principal AS p (name, is_admin) VALUES (p_principal, p_admin)
    ON CONFLICT (name) DO UPDATE SET is_admin = p.is_admin OR excluded.is_admin RETURNING p.principal_id INTO v_principal;
    INSERT INTO {schema}.login (login, principal_id) VALUES (p_login, v_principal)
    ON CONFLICT (login) DO UPDATE SET principal_id = excluded.principal_id;
    INSERT INTO {schema}.stream (name) SELECT DISTINCT n FROM unnest(p_consume || p_produce) n ORDER BY n ON CONFLICT DO NOTHING;
    INSERT INTO {schema}.stream_grant AS g (principal_id, stream_id, consume, produce)
    SELECT v_principal, s.stream_id, s.name = ANY (p_consume), s.name = ANY (p_produce)
    FROM {schema}.stream s WHERE s.name = ANY (p_consume || p_produce)
    ON CONFLICT (principal_id, stream_id) DO UPDATE SET consume = g.consume OR excluded.consume, produce = g.produce OR excluded.produce;
    PERFORM {schema}.note_role('granted', p_principal, p_login, json_build_object(
        'admin', p_admin, 'consume', p_consume, 'produce', p_produce));
END
$$;

-- Every stream with its counts: ready (due and not leased), leased, delayed, dead, the age in seconds of the oldest ready
-- one, and how many live workers consume it.
CREATE FUNCTION {schema}.stream_counts()
RETURNS TABLE (name text, paused boolean, ready bigint, leased bigint, delayed bigint, dead bigint, oldest double precision, workers bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_monitor();
    RETURN QUERY
        SELECT s.name, s.paused,
               count(m.message_id) FILTER (WHERE m.lease_token IS NULL AND m.due_at <= clock_timestamp()),
               count(m.message_id) FILTER (WHERE m.lease_token IS NOT NULL),
               count(m.message_id) FILTER (WHERE m.lease_token IS NULL AND m.due_at > clock_timestamp()),
               (SELECT count(*) FROM {schema}.dead_letter d WHERE d.stream_id = s.stream_id),
               extract(epoch FROM clock_timestamp() - min(m.due_at) FILTER (WHERE m.lease_token IS NULL AND m.due_at <= clock_timestamp()))::double precision,
               {schema}.live_workers(s.stream_id)
        FROM {schema}.stream s LEFT JOIN {schema}.message m ON m.stream_id = s.stream_id AND m.kind NOT IN ('c', 'd', 'e')
        GROUP BY s.stream_id ORDER BY s.name;
END
$$;

-- Internal: how many workers that are not silent for longer than their reclaim_delay consume a stream.
CREATE FUNCTION {schema}.live_workers(p_stream int)
RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT count(*) FROM {schema}.worker w
            WHERE p_stream = ANY (w.stream_ids) AND w.beat_at + w.reclaim_delay >= clock_timestamp());
END
$$;

-- Whether a stream has no message left, delayed and leased ones included.  For Broker.join, which asks often.
CREATE FUNCTION {schema}.stream_is_empty(p_stream int)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_count(p_stream);
    RETURN NOT EXISTS (SELECT 1 FROM {schema}.message m WHERE m.stream_id = p_stream AND m.kind NOT IN ('c', 'd', 'e'));
END
$$;

-- Every worker that is registered, with what it holds and how long ago (seconds) it was last heard of.
-- state: live, or silent for longer than its reclaim_delay.  oldest: for how many seconds it runs what it began first.
CREATE FUNCTION {schema}.list_workers()
RETURNS TABLE (
    worker_id bigint, login text, host text, pid int, threads int, streams text[], started_at timestamptz, state text,
    silent double precision, holds bigint, oldest double precision, reclaim_delay double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_monitor();
    RETURN QUERY
        SELECT w.worker_id, w.login::text, w.host, w.pid, w.threads,
               ARRAY(SELECT s.name FROM {schema}.stream s WHERE s.stream_id = ANY (w.stream_ids) ORDER BY 1),
               w.started_at,
               CASE WHEN w.beat_at + w.reclaim_delay < clock_timestamp() THEN 'silent' ELSE 'live' END,
               extract(epoch FROM clock_timestamp() - w.beat_at)::double precision, h.holds,
               extract(epoch FROM clock_timestamp() - h.since)::double precision,
               extract(epoch FROM w.reclaim_delay)::double precision
        FROM {schema}.worker w, LATERAL (
            SELECT (SELECT count(*) FROM {schema}.message m WHERE m.message_id = ANY (w.held) AND m.worker_id = w.worker_id) AS holds,
                   (SELECT min(u.since) FROM unnest(w.running, w.running_since) u (message_id, since)
                    WHERE EXISTS (SELECT 1 FROM {schema}.message m
                                  WHERE m.message_id = u.message_id AND m.worker_id = w.worker_id)) AS since) h
        ORDER BY w.worker_id;
END
$$;
