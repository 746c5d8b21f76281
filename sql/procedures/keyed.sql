-- Messages with a unique key, and members of groups.

-- Internal: store one message, of which a stream has at most one live with its key (and with its id).
-- p_conflict says what happens where there is one: skip and fail store nothing; replace takes the place of one that waits,
-- and takes the key from one that is being worked on.
-- Answers 1 and its own id: stored; 0 and the live one's id: not.
CREATE FUNCTION {schema}.store_keyed(
    p_stream int, p_message uuid, p_actor text, p_priority int, p_delay bigint, p_payload bytea, p_group uuid, p_key text,
    p_conflict text, OUT status int, OUT message_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    status := 0;
    message_id := p_message;
    FOR v_try IN 1 .. 3 LOOP
        IF p_conflict = 'replace' THEN
            DELETE FROM {schema}.message m
            WHERE m.stream_id = p_stream AND m.unique_key = p_key AND m.lease_token IS NULL AND m.message_id <> p_message;
            -- Not one that another call has stored since: its turn to be replaced is the next.
            UPDATE {schema}.message m SET unique_key = NULL
            WHERE m.stream_id = p_stream AND m.unique_key = p_key AND m.lease_token IS NOT NULL
              AND m.message_id <> p_message;
        END IF;
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, group_id, unique_key)
        VALUES (p_message, p_stream, p_priority,
                v_now + least(greatest(p_delay, 0), 315360000000) * interval '1 millisecond', v_now, p_actor, p_payload,
                p_group, p_key)
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            status := 1;
            RETURN;
        END IF;
        -- Two looks, each on its index: one for both would read the whole stream.
        SELECT m.message_id INTO store_keyed.message_id FROM {schema}.message m
        WHERE m.stream_id = p_stream AND m.unique_key = p_key;
        IF NOT FOUND THEN
            SELECT m.message_id INTO store_keyed.message_id FROM {schema}.message m
            WHERE m.message_id = p_message AND m.stream_id = p_stream;
        END IF;
        -- One that ended in this very moment makes room; one that replaces meets another that does.
        IF FOUND AND (p_conflict <> 'replace' OR store_keyed.message_id = p_message) THEN
            RETURN;
        END IF;
        message_id := p_message;
    END LOOP;
    RAISE EXCEPTION 'too many at once store messages with one unique key' USING ERRCODE = '40001';
END
$$;

-- Store messages that have a unique key or belong to a group, as enqueue_messages does others.
-- Answers per message its status (1: stored; 0: the stream has a live one with this key or id; -1: not permitted) and the
-- id of the message that is there.
CREATE FUNCTION {schema}.enqueue_keyed(
    p_sender uuid, p_batch bigint,
    p_streams int[], p_messages uuid[], p_actors text[], p_priorities int[], p_delays bigint[], p_payloads bytea[],
    p_groups uuid[], p_keys text[], p_conflicts text[])
RETURNS TABLE (status int, message_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_caller record;
    v_may int[];
    v_stored record;
    v_refused uuid[] := '{}';
    i int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    v_may := {schema}.permitted(v_caller.principal_id, v_caller.is_admin, p_streams, 'p');
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('message', cardinality(p_messages));
    END IF;
    PERFORM {schema}.begin_batch(p_sender, p_batch, cardinality(p_messages));
    FOR i IN 1 .. cardinality(p_messages) LOOP
        IF (p_streams[i] = ANY (v_may)) IS NOT TRUE OR substr(p_messages[i]::text, 15, 1) = '8' THEN
            status := -1;
            message_id := NULL;
        ELSE
            SELECT * INTO v_stored FROM {schema}.store_keyed(
                p_streams[i], p_messages[i], p_actors[i], p_priorities[i], p_delays[i], p_payloads[i], p_groups[i], p_keys[i],
                p_conflicts[i]);
            status := v_stored.status;
            message_id := v_stored.message_id;
        END IF;
        IF message_id IS DISTINCT FROM p_messages[i] THEN
            v_refused := v_refused || p_messages[i];
        END IF;
        RETURN NEXT;
    END LOOP;
    -- By the time that a lost answer is asked for, nobody could tell any more: what was stored may be done, and what was
    -- in the way gone.
    UPDATE {schema}.sender s SET refused = v_refused WHERE s.sender = p_sender AND s.refused <> v_refused;
    PERFORM {schema}.wake(v_may, p_sender IS NULL);
END
$$;
