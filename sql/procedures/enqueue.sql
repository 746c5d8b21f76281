-- For triggers and other languages: send a message, start a workflow.  What is done commits with the caller's
-- transaction.  Arguments are JSON, whatever encoder the broker has.
--
-- Unlike the procedures that workers call these fail where their arguments do: SQLSTATE 22023 with a hint, and DD001 as
-- everywhere.

-- Internal: the id of a stream that the caller may use, for p_what as in permitted().  Raises 22023 for what cannot be a
-- stream's name, and DD001; to an administrator any stream exists.
CREATE FUNCTION {schema}.stream_for(p_stream text, p_what text)
RETURNS int
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_caller record;
    v_stream int;
BEGIN
    SELECT * INTO v_caller FROM {schema}.caller();
    IF (p_stream COLLATE pg_catalog."C" ~ '^[a-zA-Z_][a-zA-Z0-9._-]{0,199}$') IS NOT TRUE THEN
        RAISE EXCEPTION '% is no name of a stream', coalesce(quote_literal(left(p_stream, 60)), 'NULL')
        USING ERRCODE = '22023',
              HINT = 'It is the queue_name of the actor: a letter or an underscore, then letters, digits, dashes, dots or underscores, 200 at the most.';
    END IF;
    SELECT o.stream_id INTO v_stream FROM {schema}.open_streams(ARRAY[p_stream]) o;
    IF cardinality({schema}.permitted(v_caller.principal_id, v_caller.is_admin, ARRAY[v_stream], p_what)) = 0 THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    END IF;
    RETURN v_stream;
END
$$;

-- Internal: raises 22023 unless these can be the arguments of a message or a workflow.
CREATE FUNCTION {schema}.check_call(p_name text, p_args jsonb, p_kwargs jsonb, p_delay interval)
RETURNS void
LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF (length(p_name) BETWEEN 1 AND 200) IS NOT TRUE THEN
        RAISE EXCEPTION 'the name of an actor or a workflow has 1 to 200 characters, not %', coalesce(length(p_name)::text, 'NULL')
        USING ERRCODE = '22023';
    ELSIF jsonb_typeof(p_args) IS DISTINCT FROM 'array' THEN
        RAISE EXCEPTION 'p_args is a JSON array, not %', coalesce(jsonb_typeof(p_args), 'NULL')
        USING ERRCODE = '22023', HINT = 'Write the positional arguments as jsonb_build_array(...), or ''["o-1", 500]''.';
    ELSIF jsonb_typeof(p_kwargs) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION 'p_kwargs is a JSON object, not %', coalesce(jsonb_typeof(p_kwargs), 'NULL')
        USING ERRCODE = '22023', HINT = 'Write the named arguments as jsonb_build_object(''cents'', 500), or ''{"cents": 500}''.';
    ELSIF p_delay < interval '0' OR p_delay > interval '3650 days' THEN
        RAISE EXCEPTION 'a delay is between nothing and ten years, not %', p_delay USING ERRCODE = '22023';
    END IF;
END
$$;

-- Send a message to an actor; answers the message's id.
--
-- p_delay: NULL is none.  p_priority: lower comes first.  p_options: the message's options, as send_with_options has them.
-- p_unique_key: while the stream has a live message with this key no second one is stored, and the answer is the id of
-- the one that is there.
CREATE FUNCTION {schema}.enqueue(
    p_stream text, p_actor text, p_args jsonb DEFAULT '[]', p_kwargs jsonb DEFAULT '{}', p_delay interval DEFAULT NULL,
    p_priority int DEFAULT 0, p_options jsonb DEFAULT '{}', p_unique_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
SET jit = off SET enable_seqscan = off
AS $$
DECLARE
    v_stream int := {schema}.stream_for(p_stream, 'p');
    v_now timestamptz := clock_timestamp();
    v_id uuid := gen_random_uuid();
    v_found uuid;
    v_payload bytea;
BEGIN
    PERFORM {schema}.check_call(p_actor, p_args, p_kwargs, p_delay);
    IF jsonb_typeof(p_options) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION 'p_options is a JSON object, not %', coalesce(jsonb_typeof(p_options), 'NULL')
        USING ERRCODE = '22023', HINT = 'Write the options as jsonb_build_object(''max_retries'', 3), or ''{"max_retries": 3}''.';
    ELSIF p_priority IS NULL THEN
        RAISE EXCEPTION 'p_priority is a number, not NULL' USING ERRCODE = '22023', HINT = 'The usual priority is 0.';
    ELSIF length(p_unique_key) NOT BETWEEN 1 AND 200 THEN
        RAISE EXCEPTION 'p_unique_key has 1 to 200 characters, not %', length(p_unique_key) USING ERRCODE = '22023';
    END IF;
    v_payload := convert_to(json_build_object(
        'queue_name', p_stream, 'actor_name', p_actor, 'args', p_args, 'kwargs', p_kwargs, 'options', p_options,
        'message_id', v_id, 'message_timestamp', (extract(epoch FROM v_now) * 1000)::bigint)::text, 'UTF8');
    IF octet_length(v_payload) > 16777216 THEN
        RAISE EXCEPTION 'the message has % bytes, more than 16777216', octet_length(v_payload)
        USING ERRCODE = '54000', HINT = 'Keep the data in a table and send its key.';
    END IF;
    IF starts_with(session_user, 'dd_') THEN
        PERFORM {schema}.check_room('message', 1);
    END IF;
    -- A live message that has the key may be gone when it is looked for: then there is room.
    FOR v_try IN 1 .. 5 LOOP
        INSERT INTO {schema}.message (message_id, stream_id, priority, due_at, enqueued_at, kind, actor, payload, unique_key)
        VALUES (v_id, v_stream, p_priority, v_now + coalesce(p_delay, interval '0'), v_now, 'j', p_actor, v_payload, p_unique_key)
        ON CONFLICT (stream_id, unique_key) WHERE unique_key IS NOT NULL DO NOTHING;
        IF FOUND THEN
            PERFORM {schema}.wake(ARRAY[v_stream], true);
            RETURN v_id;
        END IF;
        SELECT m.message_id INTO v_found FROM {schema}.message m
        WHERE m.stream_id = v_stream AND m.unique_key = p_unique_key;
        IF FOUND THEN
            RETURN v_found;
        END IF;
    END LOOP;
    RAISE EXCEPTION 'the unique key % is being fought over', quote_literal(p_unique_key)
    USING ERRCODE = '55P03', HINT = 'Try again.';
END
$$;

-- Start a run of a workflow; answers its run id.
--
-- p_workflow_id: the business key; NULL is the run's own id.  p_id_conflict, when a live run has it: fail (23505),
-- use_existing (answers that run's id) or terminate_existing.
CREATE FUNCTION {schema}.start_workflow(
    p_stream text, p_name text, p_args jsonb DEFAULT '[]', p_kwargs jsonb DEFAULT '{}', p_workflow_id text DEFAULT NULL,
    p_id_conflict text DEFAULT 'fail', p_delay interval DEFAULT NULL)
RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms'
AS $$
DECLARE
    v_stream int := {schema}.stream_for(p_stream, 'p');
    v_id uuid := gen_random_uuid();
    v_input bytea;
    v_new record;
BEGIN
    PERFORM {schema}.check_call(p_name, p_args, p_kwargs, p_delay);
    IF length(p_workflow_id) NOT BETWEEN 1 AND 200 THEN
        RAISE EXCEPTION 'a workflow id has 1 to 200 characters, not %', length(p_workflow_id) USING ERRCODE = '22023';
    ELSIF (p_id_conflict IN ('fail', 'use_existing', 'terminate_existing')) IS NOT TRUE THEN
        RAISE EXCEPTION 'p_id_conflict is fail, use_existing or terminate_existing, not %',
            coalesce(quote_literal(left(p_id_conflict, 60)), 'NULL') USING ERRCODE = '22023';
    END IF;
    v_input := convert_to(json_build_object('args', p_args, 'kwargs', p_kwargs)::text, 'UTF8');
    IF octet_length(v_input) > 16777216 THEN
        RAISE EXCEPTION 'the input has % bytes, more than 16777216', octet_length(v_input)
        USING ERRCODE = '54000', HINT = 'Keep the data in a table and send its key.';
    END IF;
    SELECT * INTO v_new FROM {schema}.create_run(
        v_id, coalesce(p_workflow_id, v_id::text), v_stream, p_name, v_input, p_id_conflict, 'allow',
        (extract(epoch FROM coalesce(p_delay, interval '0')) * 1000)::bigint, NULL, NULL, NULL, NULL,
        (SELECT c.principal_id FROM {schema}.caller() c WHERE NOT c.is_admin));
    IF v_new.status = 'denied' THEN
        RAISE EXCEPTION 'no such stream or workflow, or this login may not use it' USING ERRCODE = 'DD001';
    ELSIF v_new.status = 'busy' THEN
        RAISE EXCEPTION 'the workflow id % is being fought over', quote_literal(p_workflow_id)
        USING ERRCODE = '55P03', HINT = 'Try again.';
    ELSIF v_new.status = 'exists' AND p_id_conflict <> 'use_existing' THEN
        RAISE EXCEPTION 'a run has the workflow id % already', quote_literal(p_workflow_id)
        USING ERRCODE = '23505', HINT = 'Choose another id, or p_id_conflict => ''use_existing''.';
    END IF;
    PERFORM {schema}.wake(ARRAY[v_stream], true);
    RETURN v_new.run_id;
END
$$;
