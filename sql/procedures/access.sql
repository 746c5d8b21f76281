-- Who is calling, and what may it do.  Internal: no role may execute these.
--
-- Every procedure runs as {owner} with a fixed search_path and asks here who the caller is: session_user, looked up in
-- a table.  Foreign and missing look the same: SQLSTATE DD001 with one text.

-- The caller's principal.  Raises DD001 for a login that has no grants, or whose time is over; and for a monitor, which may
-- call nothing but what asks with require_monitor().
CREATE FUNCTION {schema}.caller(OUT principal_id int, OUT is_admin boolean, OUT kind text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT p.principal_id, p.is_admin, p.kind INTO caller.principal_id, caller.is_admin, caller.kind
    FROM {schema}.login l JOIN {schema}.principal p ON p.principal_id = l.principal_id
    WHERE l.login = session_user AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp()) AND p.kind <> 'monitor';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
END
$$;

-- The live worker behind a token.  Raises DD002 when it was declared dead: its leases are gone, it must register again.
-- A token is bound to the login that registered it.
CREATE FUNCTION {schema}.authenticate(p_worker uuid, OUT worker_id bigint, OUT principal_id int, OUT is_admin boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT w.worker_id, p.principal_id, p.is_admin
    INTO authenticate.worker_id, authenticate.principal_id, authenticate.is_admin
    FROM {schema}.worker w
    JOIN {schema}.login l ON l.login = w.login AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp())
    JOIN {schema}.principal p ON p.principal_id = l.principal_id
    WHERE w.token = p_worker AND w.login = session_user;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this worker is not registered, or was declared dead' USING ERRCODE = 'DD002';
    END IF;
END
$$;

-- Which of these streams a principal may (p_what)
--   c: consume;  a: consume messages and activities of: all but a 'workflow';
--   r: run and look into the workflows of: who consumes it, but not an 'activity';
--   p: produce to;  e: speak to the workflows of: who may do p or r.
CREATE FUNCTION {schema}.permitted(p_principal int, p_admin boolean, p_streams int[], p_what text)
RETURNS int[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_admin THEN
        RETURN ARRAY(SELECT s.stream_id FROM {schema}.stream s WHERE s.stream_id = ANY (p_streams));
    END IF;
    RETURN ARRAY(
        SELECT g.stream_id FROM {schema}.stream_grant g JOIN {schema}.principal p ON p.principal_id = g.principal_id
        WHERE g.principal_id = p_principal AND g.stream_id = ANY (p_streams)
          AND CASE p_what WHEN 'c' THEN g.consume WHEN 'a' THEN g.consume AND p.kind <> 'workflow'
                          WHEN 'p' THEN g.produce WHEN 'r' THEN g.consume AND p.kind <> 'activity'
                          WHEN 'e' THEN g.produce OR g.consume AND p.kind <> 'activity' END);
END
$$;

-- Whether a principal may look into a run, and end it: it runs the workflows of its stream; or it has started it, and may
-- still produce to the stream.  p_principal NULL: an administrator.
CREATE FUNCTION {schema}.may_read(p_principal int, p_stream int, p_starter int)
RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN p_principal IS NULL OR EXISTS (
        SELECT 1 FROM {schema}.stream_grant g JOIN {schema}.principal p ON p.principal_id = g.principal_id
        WHERE g.principal_id = p_principal AND g.stream_id = p_stream
          AND (g.consume AND p.kind <> 'activity' OR g.produce AND p_starter = p_principal));
END
$$;

-- Wake those who wait for these streams.  NOTIFY takes a database-wide lock at commit, so it is paid only where
-- somebody waits; while the notification queue is filling up nothing is sent, and polling finds the message.
-- p_later: the transaction is the caller's own and commits whenever he likes; by then anybody may wait.
CREATE FUNCTION {schema}.wake(p_streams int[], p_later boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_stream int;
BEGIN
    FOR v_stream IN
        SELECT DISTINCT s FROM {schema}.worker w, unnest(w.stream_ids) s
        WHERE (p_later OR w.waiting_until > clock_timestamp()) AND w.stream_ids && p_streams AND s = ANY (p_streams)
    LOOP
        IF pg_notification_queue_usage() < 0.25 THEN
            PERFORM pg_notify('{namespace}:s' || v_stream, '');
        END IF;
    END LOOP;
END
$$;

-- A batch is committed once: its number must be higher than any the sender has committed or given up.
-- Raises DD003 for a batch that was given up, and 54000 for one of too many items; nothing of it is stored.
CREATE FUNCTION {schema}.begin_batch(p_sender uuid, p_batch bigint, p_items int)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_items > 10000 THEN
        RAISE EXCEPTION 'a call has at most 10000 items, not %', p_items USING ERRCODE = '54000';
    END IF;
    IF p_sender IS NULL THEN
        -- Part of a transaction of the caller's own, whose outcome he finds out by himself.
        RETURN;
    END IF;
    IF starts_with(session_user, 'dd_') AND NOT EXISTS (SELECT 1 FROM {schema}.sender s WHERE s.sender = p_sender) THEN
        PERFORM {schema}.check_room('sender', 1);
    END IF;
    INSERT INTO {schema}.sender AS s (sender, login, batch, at)
    VALUES (p_sender, session_user, p_batch, clock_timestamp())
    ON CONFLICT (sender) DO UPDATE SET batch = excluded.batch, at = excluded.at
    WHERE s.batch < excluded.batch AND s.login = excluded.login;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this batch was given up' USING ERRCODE = 'DD003';
    END IF;
END
$$;

-- Which migrations and procedures this namespace has; whoever may use the namespace may ask.
CREATE FUNCTION {schema}.schema_version(OUT version int, OUT checksum text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT max(m.version) INTO schema_version.version FROM {schema}.migration m;
    SELECT p.checksum INTO schema_version.checksum FROM {schema}.procedures p;
END
$$;

-- What tells this namespace from any other; and whether the caller's login has grants in it.  Never fails: it is asked on
-- connections whose open transaction belongs to somebody else.
CREATE FUNCTION {schema}.namespace_identity(OUT id uuid, OUT granted boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A dump that was restored elsewhere, or a database's clone, has its table's row: not its place.
    SELECT md5(i.id::text || ':' || d.oid || ':' || (SELECT c.system_identifier FROM pg_control_system() c))::uuid
    INTO namespace_identity.id FROM {schema}.identity i, pg_database d WHERE d.datname = current_database();
    namespace_identity.granted := EXISTS (
        SELECT 1 FROM {schema}.login l
        WHERE l.login = session_user AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp()));
END
$$;
