-- What Dramatiq's brokers do with a queue as a whole.  For administrators; the counts, also for monitors and for whoever
-- consumes the stream.

-- Internal: raises DD001 unless the caller is an administrator or a monitor, or consumes the stream.
CREATE FUNCTION {schema}.require_count(p_stream int)
RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM 1 FROM {schema}.login l JOIN {schema}.principal p ON p.principal_id = l.principal_id
    WHERE l.login = session_user AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp())
      AND (p.is_admin OR p.kind = 'monitor' OR cardinality({schema}.permitted(p.principal_id, false, ARRAY[p_stream], 'c')) = 1);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
END
$$;

-- What a stream has: ready (due, and with no worker), delayed, and its dead letters.
CREATE FUNCTION {schema}.queue_counts(p_stream int)
RETURNS TABLE (ready bigint, delayed bigint, dead bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_count(p_stream);
    RETURN QUERY
        SELECT count(*) FILTER (WHERE m.due_at <= clock_timestamp()), count(*) FILTER (WHERE m.due_at > clock_timestamp()),
               (SELECT count(*) FROM {schema}.dead_letter d WHERE d.stream_id = p_stream)
        FROM {schema}.message m WHERE m.stream_id = p_stream AND m.lease_token IS NULL AND m.kind NOT IN ('c', 'd', 'e');
END
$$;

-- Drop what waits on streams (not what is leased, and nothing of a run) and their dead letters.
CREATE FUNCTION {schema}.flush_streams(p_streams int[])
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
BEGIN
    PERFORM {schema}.require_admin();
    DELETE FROM {schema}.message m WHERE m.stream_id = ANY (p_streams) AND m.kind IN ('m', 'j') AND m.lease_token IS NULL;
    DELETE FROM {schema}.dead_letter d WHERE d.stream_id = ANY (p_streams);
END
$$;
