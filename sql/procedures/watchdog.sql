-- The watchdog: sessions of provisioned logins that are over their limits end.
--
-- What a login's settings say is no limit: it can change them.  Whose a session is, and since when it does what, the server
-- itself says: neither SET ROLE nor an application_name changes it.

-- One look, by the process p_pid on p_host.  Ends (and records) the sessions
--   whose login is over (expired) or may not log in any more (revoked);
--   whose statement runs for longer than max_statement (statement);
--   whose transaction is open for longer than max_transaction (transaction), but for that of a single statement.
-- Only of provisioned logins, never of an administrator's.  p_known: sessions that an earlier look has ended and recorded.
-- Answers who (session names it for p_known), why, for how many seconds, and how many were allowed; and, unseen, the
-- logins whose sessions {owner} may not see.
CREATE FUNCTION {schema}.end_sessions(p_host text, p_pid int, p_known text[])
RETURNS TABLE (
    session text, pid int, login text, principal text, why text, seconds double precision, allowed double precision,
    address text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_row record;
BEGIN
    PERFORM {schema}.require_admin();
    FOR v_row IN
        SELECT a.pid || ':' || coalesce(extract(epoch FROM a.backend_start), 0) AS session, a.pid, l.login, p.name AS principal, w.why,
               extract(epoch FROM v_now - CASE w.why WHEN 'statement' THEN a.query_start WHEN 'transaction' THEN x.since
                                          ELSE coalesce(a.backend_start, v_now) END)::double precision AS seconds,
               extract(epoch FROM CASE w.why WHEN 'statement' THEN p.max_statement
                                  WHEN 'transaction' THEN p.max_transaction END)::double precision AS allowed,
               coalesce(host(a.client_addr), 'local') AS address
        FROM {schema}.login l
        JOIN {schema}.principal p ON p.principal_id = l.principal_id
        JOIN pg_roles r ON r.rolname = l.login
        -- The one that logged in, not the one that it acts as.  A parallel worker ends with its leader.
        JOIN pg_stat_activity a ON a.usesysid = r.oid AND a.leader_pid IS NULL,
        -- One that has failed has no beginning any more, and counts from then.
        LATERAL (SELECT coalesce(
            a.xact_start, CASE WHEN a.state = 'idle in transaction (aborted)' THEN a.state_change END)) x (since),
        LATERAL (SELECT CASE
            WHEN NOT pg_has_role(r.oid, 'USAGE') THEN 'unseen'
            WHEN least(l.expires_at, r.rolvaliduntil) <= v_now THEN 'expired'
            WHEN NOT r.rolcanlogin THEN 'revoked'
            WHEN a.state IN ('active', 'fastpath function call') AND v_now - a.query_start > p.max_statement THEN 'statement'
            -- A single statement's transaction begins with it, give or take the time between its messages.  One
            -- that is idle and has a transaction is being sent notifications that it does not read.
            WHEN v_now - x.since > p.max_transaction
                 AND NOT (a.state = 'active' AND a.query_start < x.since + interval '1 second') THEN 'transaction'
            END) w (why)
        WHERE l.provisioned AND NOT p.is_admin AND w.why IS NOT NULL
          -- Not one of the same name that somebody else has made since.
          AND shobj_description(r.oid, 'pg_authid') = {schema}.worker_mark(p.name)
    LOOP
        -- Terminated, not cancelled: a statement's end would leave its transaction open, and its client may go on.
        CONTINUE WHEN v_row.why <> 'unseen' AND NOT pg_terminate_backend(v_row.pid);
        CONTINUE WHEN v_row.session = ANY (p_known);
        IF v_row.why <> 'unseen' THEN
            INSERT INTO {schema}.role_event (action, principal, login, details)
            VALUES ('ended', v_row.principal, v_row.login, json_build_object(
                'why', v_row.why, 'seconds', round(v_row.seconds::numeric, 1), 'allowed', v_row.allowed, 'pid', v_row.pid,
                'address', v_row.address));
        END IF;
        session := v_row.session;
        pid := v_row.pid;
        login := v_row.login;
        principal := v_row.principal;
        why := v_row.why;
        seconds := v_row.seconds;
        allowed := v_row.allowed;
        address := v_row.address;
        RETURN NEXT;
    END LOOP;
    INSERT INTO {schema}.watchdog AS w (login, host, pid, looked_at) VALUES (session_user, left(p_host, 200), p_pid, v_now)
    ON CONFLICT (one) DO UPDATE
    SET login = excluded.login, host = excluded.host, pid = excluded.pid, looked_at = excluded.looked_at;
    -- Whoever is ended again and again leaves no more than a month of it.
    DELETE FROM {schema}.role_event e WHERE e.action = 'ended' AND e.at < v_now - interval '30 days';
END
$$;
