-- What is slow or stuck, one by one, for whoever looks at a namespace.  For administrators: it names messages and runs.

-- Answers at most 20 rows of each kind (what), those that last longest first:
--   ready: the first message that could be claimed, of a stream and a priority, where it is among the first p_most that
--   are due;  running: what workers run;
--   task_failure: open runs whose last task failed;  escalation: those that wait for somebody (among the p_most that are
--   first in line);  dead: of each stream and reason the latest dead letter, where it died within the last hour and is among
--   the stream's latest 100: those that died last.
-- name: the actor, the workflow or the role; id: of the message or the escalation, or the workflow id; kind: of the message,
-- or the reason of its death.
-- Bounded: along the indexes, with at most 100 priorities and dead letters of a stream, 1,000 messages that a worker runs, and
-- p_most (at most 10,000) rows of what is leased, alarms and escalations.
CREATE FUNCTION {schema}.find_stuck(p_most int)
RETURNS TABLE (
    what text, stream text, name text, id text, run_id uuid, kind text, worker_id bigint, since timestamptz, attempt int, failure text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_most int := least(greatest(p_most, 1), 10000);
BEGIN
    PERFORM {schema}.require_admin();
    RETURN QUERY
        WITH RECURSIVE p AS (
            SELECT s.stream_id, s.name, 1 AS n,
                   (SELECT m.priority FROM {schema}.message m
                    WHERE m.stream_id = s.stream_id ORDER BY m.priority LIMIT 1) AS priority
            FROM {schema}.stream s
            UNION ALL
            SELECT p.stream_id, p.name, p.n + 1,
                   (SELECT m.priority FROM {schema}.message m
                    WHERE m.stream_id = p.stream_id AND m.priority > p.priority ORDER BY m.priority LIMIT 1)
            FROM p WHERE p.priority IS NOT NULL AND p.n < 100)
        SELECT 'ready', p.name, f.actor, f.message_id::text, f.run_id, f.kind::text, NULL::bigint, f.due_at, f.attempt, f.last_failure
        FROM p CROSS JOIN LATERAL (
            SELECT m.* FROM (
                SELECT o.* FROM {schema}.message o
                WHERE o.stream_id = p.stream_id AND o.priority = p.priority AND o.due_at <= v_now
                ORDER BY o.due_at LIMIT v_most) m
            WHERE m.lease_token IS NULL AND m.kind NOT IN ('c', 'd', 'e')
            ORDER BY m.due_at LIMIT 1) f
        ORDER BY f.due_at LIMIT 20;
    RETURN QUERY
        SELECT 'running', s.name, m.actor, m.message_id::text, m.run_id, m.kind::text, r.worker_id, r.since, m.attempt, m.last_failure
        FROM (SELECT w.worker_id, u.message_id, greatest(u.since, w.started_at) AS since
              FROM {schema}.worker w, unnest(w.running[:1000], w.running_since[:1000]) u (message_id, since)) r
        -- Before any limit: what a worker says that it runs, and does not hold, takes nobody's place.
        JOIN {schema}.message m ON m.message_id = r.message_id AND m.worker_id = r.worker_id
        JOIN {schema}.stream s ON s.stream_id = m.stream_id
        ORDER BY r.since LIMIT 20;
    RETURN QUERY
        SELECT 'task_failure', s.name, r.name, r.workflow_id, r.run_id, NULL::text, NULL::bigint, r.started_at, NULL::int, r.task_failure
        FROM {schema}.run r JOIN {schema}.stream s ON s.stream_id = r.stream_id
        WHERE r.status = 'running' AND r.task_failure IS NOT NULL ORDER BY r.started_at LIMIT 20;
    RETURN QUERY
        SELECT 'escalation', s.name, e.role, e.escalation_id::text, e.run_id, NULL::text, NULL::bigint, e.opened_at, NULL::int, NULL::text
        FROM (SELECT o.* FROM {schema}.escalation o WHERE o.status = 'open' ORDER BY o.priority, o.opened_at LIMIT v_most) e
        JOIN {schema}.stream s ON s.stream_id = e.stream_id
        WHERE (e.claimed_until > v_now) IS NOT TRUE ORDER BY e.opened_at LIMIT 20;
    RETURN QUERY
        SELECT 'dead', s.name, d.actor, d.message_id::text, NULL::uuid, d.reason, NULL::bigint, d.died_at, d.attempt, d.failure
        FROM {schema}.stream s CROSS JOIN LATERAL (
            SELECT DISTINCT ON (l.reason) l.* FROM (
                SELECT o.* FROM {schema}.dead_letter o WHERE o.stream_id = s.stream_id AND o.died_at > v_now - interval '1 hour'
                ORDER BY o.died_at DESC LIMIT 100) l
            ORDER BY l.reason, l.died_at DESC) d
        ORDER BY d.died_at DESC LIMIT 20;
END
$$;
