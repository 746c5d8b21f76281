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
        WHEN 'ActivityCancelled', 'ActivityCancelRequested' THEN
            PERFORM {schema}.cancel_activity(p_run, p_seq, p_name, p_type = 'ActivityCancelRequested');
        WHEN 'SearchUpserted' THEN
            PERFORM {schema}.upsert_search(p_run, (p_attributes -> 'search')::jsonb);
        WHEN 'EscalationOpened' THEN
            PERFORM {schema}.open_escalation(p_run, p_seq, p_name, p_payload, p_attributes);
        WHEN 'EscalationTimedOut' THEN
            PERFORM {schema}.take_back_escalation(p_run, p_seq, 'timed_out');
        WHEN 'EscalationWithdrawn' THEN
            PERFORM {schema}.take_back_escalation(p_run, p_seq, 'cancelled');
        WHEN 'EntityChanged' THEN
            PERFORM {schema}.change_entity(p_run, p_attributes);
        WHEN 'TopicEmitted' THEN
            PERFORM {schema}.emit_to_topic(p_run, p_event, p_name);
        WHEN 'OutputWritten' THEN
            PERFORM {schema}.wake_followers(p_run);
        WHEN 'UpdateAccepted', 'UpdateCompleted', 'UpdateRejected' THEN
            PERFORM {schema}.note_update(p_run, p_event, p_type, p_attributes);
        WHEN 'ChildStartAwaited' THEN
            PERFORM {schema}.confirm_child(p_run, p_seq, (p_attributes ->> 'child')::int);
    END CASE;
END
$$;
