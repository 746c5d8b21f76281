-- Moving in from another broker: administrators only.
--
-- A batch is stored here, then removed there, then the next one is stored.  The journal names what was stored and may not
-- be removed yet; it changes in the transaction that stores.  Whoever goes on after a crash reads it first: what he is
-- given again and finds in the journal is here already, even where a worker has finished with it meanwhile.
-- A journal is one row among the results, where only administrators write and read, and expires like them.

-- What may still be at its source although it is stored: the marks, 16 bytes each.
CREATE FUNCTION {schema}.import_journal(p_source uuid, p_stream int)
RETURNS bytea
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM {schema}.require_admin();
    RETURN (SELECT r.value FROM {schema}.result r
            WHERE r.key = 'dramatiq_durable.import:' || p_source || ':' || p_stream AND r.stream_id = 0);
END
$$;

-- Store a batch of messages that were sent through another broker, and note it in the journal.  Answers 1: stored; 0: the
-- stream has a live message with this id already.
-- p_removed: marks of earlier batches that are no longer at the source; p_marks: those of this one, 16 bytes each.
-- Times are milliseconds since 1970: p_due (NULL: now), p_sent, and p_died, which makes it a dead letter.
-- Messages of one call keep their order: each is due a microsecond after the one before it.
CREATE FUNCTION {schema}.import_messages(
    p_sender uuid, p_batch bigint, p_source uuid, p_stream int, p_removed bytea, p_marks bytea,
    p_messages uuid[], p_actors text[], p_priorities int[], p_due bigint[], p_sent bigint[], p_attempts int[],
    p_died bigint[], p_failures text[], p_payloads bytea[])
RETURNS int[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_key text := 'dramatiq_durable.import:' || p_source || ':' || p_stream;
    v_gone bytea[];
    v_journal bytea;
    v_stored uuid[];
BEGIN
    PERFORM {schema}.require_admin();
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_messages));
    v_gone := ARRAY(SELECT substr(p_removed, 1 + 16 * n, 16) FROM generate_series(0, length(p_removed) / 16 - 1) n);
    SELECT r.value INTO v_journal FROM {schema}.result r WHERE r.key = v_key AND r.stream_id = 0 FOR UPDATE;
    SELECT string_agg(m.mark, '' ORDER BY m.n) INTO v_journal
    FROM (SELECT substr(v_journal, 1 + 16 * n, 16) AS mark, n FROM generate_series(0, length(v_journal) / 16 - 1) n) m
    WHERE NOT m.mark = ANY (v_gone);
    v_journal := coalesce(v_journal, '') || p_marks;
    IF v_journal = '' THEN
        DELETE FROM {schema}.result r WHERE r.key = v_key AND r.stream_id = 0;
    ELSE
        INSERT INTO {schema}.result AS r (key, stream_id, expires_at, value)
        VALUES (v_key, 0, v_now + interval '7 days', v_journal)
        ON CONFLICT (key, stream_id) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at;
    END IF;
    WITH given AS MATERIALIZED (
        SELECT t.* FROM unnest(p_messages, p_actors, p_priorities, p_due, p_sent, p_attempts, p_died, p_failures, p_payloads)
             WITH ORDINALITY t (message_id, actor, priority, due, sent, attempt, died, failure, payload, n)),
    live AS (
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, attempt, actor, payload)
        SELECT g.message_id, p_stream, g.priority,
               greatest(v_now, to_timestamp(g.due / 1000.0)) + g.n * interval '1 microsecond',
               least(to_timestamp(g.sent / 1000.0), v_now), g.attempt, g.actor, g.payload
        FROM given g WHERE g.died IS NULL
        ON CONFLICT (message_id, stream_id) DO NOTHING
        RETURNING message_id),
    dead AS (
        INSERT INTO {schema}.dead_letter (
            message_id, stream_id, priority, enqueued_at, died_at, attempt, deaths, actor, reason, failure, payload)
        SELECT g.message_id, p_stream, g.priority, least(to_timestamp(g.sent / 1000.0), v_now),
               least(to_timestamp(g.died / 1000.0), v_now), g.attempt, 0, g.actor, 'rejected', g.failure, g.payload
        FROM given g WHERE g.died IS NOT NULL ORDER BY g.n
        RETURNING message_id)
    SELECT array_agg(s.message_id) INTO v_stored
    FROM (SELECT l.message_id FROM live l UNION ALL SELECT d.message_id FROM dead d) s;
    PERFORM {schema}.wake(ARRAY[p_stream]);
    RETURN ARRAY(SELECT (v_stored IS NOT NULL AND t.message_id = ANY (v_stored))::int
                 FROM unnest(p_messages) WITH ORDINALITY t (message_id, n) ORDER BY t.n);
END
$$;
