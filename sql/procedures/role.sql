-- Workers' roles: principals that `role provision` made, and their logins.  Administrators only.
--
-- The roles themselves are made, altered and dropped by the login that asks, in the same transactions: that needs its
-- own rights, not {owner}'s.  {owner} is a member of every login that was made, and so may end its sessions.
-- Roles are the server's, not the database's.  One is ours only while its comment says so: a login of the same name that
-- somebody else has made, or that another database's clone of these tables speaks of, is not touched.

-- Internal: write down what was done.
CREATE FUNCTION {schema}.note_role(p_action text, p_principal text, p_login text, p_details json)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO {schema}.role_event (at, by, action, principal, login, details)
    VALUES (clock_timestamp(), session_user, p_action, p_principal, p_login, p_details);
END
$$;

-- The comment that makes a role the login of a worker of this namespace.
CREATE FUNCTION {schema}.worker_mark(p_name text)
RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN 'dramatiq_durable: worker ' || quote_literal(p_name) || ' of the namespace {namespace} of the database '
        || quote_ident(current_database());
END
$$;

-- Internal: a worker that was provisioned; its row stays locked, so that what is done to it is done one after the other.
-- Raises DD009 where there is none, and DD010 for a login that was granted by hand: that one is not ours to change.
CREATE FUNCTION {schema}.find_worker(p_name text)
RETURNS {schema}.principal
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_found {schema}.principal;
BEGIN
    PERFORM {schema}.require_admin();
    SELECT p.* INTO v_found FROM {schema}.principal p WHERE p.name = p_name FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no worker role %', quote_literal(left(p_name, 200)) USING ERRCODE = 'DD009';
    ELSIF v_found.kind = 'application' THEN
        RAISE EXCEPTION '% was not provisioned: it is a login of its own, with grants', quote_literal(p_name)
        USING ERRCODE = 'DD010';
    END IF;
    RETURN v_found;
END
$$;

-- A new worker, without a login yet.  Its streams come into being here.  Times in milliseconds; NULL: no limit.
-- Raises DD008 where the name is taken.
CREATE FUNCTION {schema}.add_worker(
    p_name text, p_kind text, p_consume text[], p_produce text[], p_max_live int, p_max_statement bigint,
    p_max_transaction bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_principal int;
BEGIN
    PERFORM {schema}.require_admin();
    IF (p_kind IN ('worker', 'activity', 'workflow', 'producer', 'monitor')) IS NOT TRUE
       OR (p_kind IN ('producer', 'monitor') AND cardinality(p_consume) > 0)
       OR (p_kind = 'monitor' AND cardinality(p_produce) > 0) THEN
        RAISE EXCEPTION 'a % has no such grants', quote_nullable(p_kind) USING ERRCODE = '22023';
    END IF;
    INSERT INTO {schema}.principal (name, kind, max_live, max_statement, max_transaction)
    VALUES (p_name, p_kind, p_max_live, p_max_statement * interval '1 millisecond',
            p_max_transaction * interval '1 millisecond')
    ON CONFLICT (name) DO NOTHING RETURNING principal_id INTO v_principal;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is a role % already', quote_literal(p_name) USING ERRCODE = 'DD008';
    END IF;
    INSERT INTO {schema}.stream (name) SELECT DISTINCT n FROM unnest(p_consume || p_produce) n ORDER BY n ON CONFLICT DO NOTHING;
    INSERT INTO {schema}.stream_grant (principal_id, stream_id, consume, produce)
    SELECT v_principal, s.stream_id, s.name = ANY (p_consume), s.name = ANY (p_produce)
    FROM {schema}.stream s WHERE s.name = ANY (p_consume || p_produce);
    PERFORM {schema}.note_role('provisioned', p_name, NULL, json_strip_nulls(json_build_object(
        'kind', p_kind, 'consume', p_consume, 'produce', p_produce, 'max_live', p_max_live,
        'max_statement', p_max_statement / 1000.0, 'max_transaction', p_max_transaction / 1000.0)));
END
$$;

-- A worker's logins, the oldest first, and (serial) the number of the next one: no name comes twice.
-- ours: whether the role is there and has our comment.  lifetime: for how many milliseconds it was made; NULL: for ever.
CREATE FUNCTION {schema}.worker_logins(p_name text)
RETURNS TABLE (
    login text, over boolean, ours boolean, there boolean, connection_limit int, lifetime bigint, serial bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_worker {schema}.principal := {schema}.find_worker(p_name);
    v_made bigint;
BEGIN
    SELECT count(*) INTO v_made FROM {schema}.role_event e WHERE e.principal = p_name AND e.action = 'login';
    RETURN QUERY
        SELECT l.login::text, coalesce(l.expires_at <= clock_timestamp(), false),
               coalesce(l.provisioned AND shobj_description(r.oid, 'pg_authid') = {schema}.worker_mark(p_name), false),
               r.oid IS NOT NULL, r.rolconnlimit,
               (extract(epoch FROM l.expires_at - l.created_at) * 1000)::bigint, v_made + 1
        FROM (SELECT v_worker.principal_id AS id) p
        LEFT JOIN {schema}.login l ON l.principal_id = p.id LEFT JOIN pg_roles r ON r.rolname = l.login
        ORDER BY l.created_at, l.login;
END
$$;

-- A login of a worker: it may be used until p_expires, or for p_lifetime milliseconds; NULL: for ever.  Those that it had
-- before go on for p_overlap milliseconds (NULL: there are none).  Answers when each of its logins ends.
CREATE FUNCTION {schema}.add_worker_login(
    p_name text, p_login text, p_expires timestamptz, p_lifetime bigint, p_overlap bigint)
RETURNS TABLE (login text, expires_at timestamptz)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
#variable_conflict use_column
DECLARE
    v_worker {schema}.principal := {schema}.find_worker(p_name);
    v_now timestamptz := clock_timestamp();
    v_before text[];
    v_expires timestamptz := coalesce(p_expires, v_now + p_lifetime * interval '1 millisecond');
BEGIN
    UPDATE {schema}.login l
    SET expires_at = least(l.expires_at, v_now + p_overlap * interval '1 millisecond')
    WHERE l.principal_id = v_worker.principal_id AND (l.expires_at IS NULL OR l.expires_at > v_now);
    v_before := ARRAY(SELECT l.login::text FROM {schema}.login l
                      WHERE l.principal_id = v_worker.principal_id ORDER BY l.created_at, l.login);
    INSERT INTO {schema}.login (login, principal_id, expires_at, provisioned, created_at)
    VALUES (p_login, v_worker.principal_id, v_expires, true, v_now);
    PERFORM {schema}.note_role('login', p_name, p_login, json_strip_nulls(json_build_object('expires_at', v_expires)));
    IF cardinality(v_before) > 0 THEN
        PERFORM {schema}.note_role('rotated', p_name, p_login, json_build_object(
            'before', v_before, 'overlap', p_overlap / 1000.0));
    END IF;
    RETURN QUERY SELECT l.login::text, l.expires_at FROM {schema}.login l
                 WHERE l.principal_id = v_worker.principal_id ORDER BY l.created_at, l.login;
END
$$;

-- A worker may do nothing from now on: its grants are gone, and its logins are over.  May be called again.
CREATE FUNCTION {schema}.disable_worker(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_worker {schema}.principal := {schema}.find_worker(p_name);
    v_now timestamptz := clock_timestamp();
    v_logins text[];
BEGIN
    DELETE FROM {schema}.stream_grant g WHERE g.principal_id = v_worker.principal_id;
    WITH ended AS (
        UPDATE {schema}.login l SET expires_at = v_now
        WHERE l.principal_id = v_worker.principal_id AND (l.expires_at IS NULL OR l.expires_at > v_now)
        RETURNING l.login)
    SELECT array_agg(e.login::text ORDER BY e.login) INTO v_logins FROM ended e;
    IF v_logins IS NOT NULL THEN
        PERFORM {schema}.note_role('revoked', p_name, NULL, json_build_object('logins', v_logins));
    END IF;
END
$$;

-- End the sessions of a worker's logins that are over.  Answers how many there were; to be called until there are none.
CREATE FUNCTION {schema}.end_worker_sessions(p_name text)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_worker {schema}.principal := {schema}.find_worker(p_name);
BEGIN
    RETURN (SELECT count(pg_terminate_backend(a.pid))
            FROM {schema}.login l JOIN pg_stat_activity a ON a.usename = l.login
            WHERE l.principal_id = v_worker.principal_id AND l.provisioned AND l.expires_at <= clock_timestamp()
              -- Not one of the same name that somebody else has made since.
              AND shobj_description(a.usesysid, 'pg_authid') = {schema}.worker_mark(p_name));
END
$$;

-- Give back what the processes hold that registered with a worker's logins that are over; nothing of it counts as a death
-- that could make poison of a message.  Answers how many messages.
CREATE FUNCTION {schema}.give_back_of_worker(p_name text)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_worker {schema}.principal := {schema}.find_worker(p_name);
    v_process bigint;
    v_given bigint := 0;
BEGIN
    FOR v_process IN
        SELECT w.worker_id FROM {schema}.worker w JOIN {schema}.login l ON l.login = w.login
        WHERE l.principal_id = v_worker.principal_id AND l.provisioned AND l.expires_at <= clock_timestamp()
        ORDER BY w.worker_id FOR UPDATE OF w
    LOOP
        v_given := v_given + (SELECT t.reclaimed + t.dead FROM {schema}.take_back(v_process, 2147483647) t);
    END LOOP;
    RETURN v_given;
END
$$;

-- These logins of a worker are no more; nor is the worker, when it was its last.
CREATE FUNCTION {schema}.forget_worker_logins(p_name text, p_logins text[])
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_worker {schema}.principal := {schema}.find_worker(p_name);
BEGIN
    DELETE FROM {schema}.login l
    WHERE l.principal_id = v_worker.principal_id AND l.login = ANY (p_logins) AND l.provisioned
      AND l.expires_at <= clock_timestamp();
    DELETE FROM {schema}.principal p
    WHERE p.principal_id = v_worker.principal_id
      AND NOT EXISTS (SELECT 1 FROM {schema}.login l WHERE l.principal_id = p.principal_id);
END
$$;

-- Who may use the namespace: a row for each login.  Times in seconds.
-- state: live; expired; missing (there is no such role any more); barred (the role may not log in).
CREATE FUNCTION {schema}.list_roles()
RETURNS TABLE (
    name text, kind text, consume text[], produce text[], max_live int, max_statement double precision,
    max_transaction double precision, created_at timestamptz, login text, login_created_at timestamptz,
    expires_at timestamptz, connection_limit int, sessions bigint, state text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_admin();
    RETURN QUERY
        SELECT p.name, CASE WHEN p.is_admin THEN 'administrator' ELSE p.kind END,
               ARRAY(SELECT s.name FROM {schema}.stream_grant g JOIN {schema}.stream s ON s.stream_id = g.stream_id
                     WHERE g.principal_id = p.principal_id AND g.consume ORDER BY 1),
               ARRAY(SELECT s.name FROM {schema}.stream_grant g JOIN {schema}.stream s ON s.stream_id = g.stream_id
                     WHERE g.principal_id = p.principal_id AND g.produce ORDER BY 1),
               p.max_live, extract(epoch FROM p.max_statement)::double precision,
               extract(epoch FROM p.max_transaction)::double precision, p.created_at, l.login::text, l.created_at,
               l.expires_at, nullif(r.rolconnlimit, -1),
               (SELECT count(*) FROM pg_stat_activity a WHERE a.usename = l.login),
               CASE WHEN l.login IS NULL THEN NULL WHEN r.oid IS NULL THEN 'missing'
                    WHEN l.expires_at <= clock_timestamp() THEN 'expired' WHEN NOT r.rolcanlogin THEN 'barred' ELSE 'live' END
        FROM {schema}.principal p
        LEFT JOIN {schema}.login l ON l.principal_id = p.principal_id LEFT JOIN pg_roles r ON r.rolname = l.login
        ORDER BY p.name, l.created_at, l.login;
END
$$;

-- What was done to a principal (NULL: to any), the latest first.
CREATE FUNCTION {schema}.list_role_events(p_name text, p_limit int)
RETURNS TABLE (at timestamptz, by text, action text, principal text, login text, details text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_admin();
    RETURN QUERY
        SELECT e.at, e.by::text, e.action, e.principal, e.login::text, e.details::text FROM {schema}.role_event e
        WHERE p_name IS NULL OR e.principal = p_name
        ORDER BY e.role_event_id DESC LIMIT least(greatest(p_limit, 1), 10000);
END
$$;
