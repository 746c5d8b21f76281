-- What the events of a step bring about beside their being recorded, in the same transaction.

-- Internal: carry out one event of a run that is being advanced; its row is locked.  advance() names the types that come
-- here.  What cannot be carried out is news for the run: it goes into its inbox.
CREATE FUNCTION {schema}.carry_out(
    p_run uuid, p_event int, p_type text, p_seq int, p_name text, p_payload bytea, p_attributes json)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CASE p_type
        WHEN 'SearchUpserted' THEN
            NULL;
        WHEN 'UpdateAccepted', 'UpdateCompleted', 'UpdateRejected' THEN
            PERFORM {schema}.note_update(p_run, p_event, p_type, p_attributes);
        WHEN 'ChildStartAwaited' THEN
            PERFORM {schema}.confirm_child(p_run, p_seq, (p_attributes ->> 'child')::int);
    END CASE;
END
$$;
