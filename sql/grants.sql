-- Who may execute what.  Applied after the procedures; repeatable.
--
-- Nobody but {owner} has any right by default.  {worker} is a role that cannot log in; a scoped worker's login is its
-- member and so may call these procedures, each of which looks up what that login was granted.
REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA {schema} FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC;
REVOKE ALL ON SCHEMA {schema} FROM PUBLIC;

GRANT USAGE ON SCHEMA {schema} TO {worker}, {admin};
GRANT EXECUTE ON FUNCTION
    {schema}.schema_version, {schema}.namespace_identity, {schema}.open_streams, {schema}.enqueue_messages, {schema}.enqueue_message, {schema}.batch_outcome,
    {schema}.enqueue_keyed, {schema}.claim, {schema}.leave, {schema}.fail_settling, {schema}.ack, {schema}.reschedule, {schema}.release, {schema}.bury, {schema}.mark_started,
    {schema}.register_worker, {schema}.consume_streams, {schema}.unregister_worker, {schema}.heartbeat, {schema}.resync, {schema}.reclaim,
    {schema}.start_runs, {schema}.post, {schema}.terminate_run, {schema}.get_run, {schema}.get_closing, {schema}.get_history, {schema}.await_run,
    {schema}.run_of_lease, {schema}.history_of_lease, {schema}.complete_activities, {schema}.fail_task, {schema}.advance,
    {schema}.enqueue, {schema}.start_workflow,
    {schema}.store_result, {schema}.get_results, {schema}.sweep, {schema}.limiter_add, {schema}.limiter_change, {schema}.limiter_change_sum,
    {schema}.save_schedule, {schema}.control_schedule, {schema}.fire_by_hand, {schema}.list_schedules,
    {schema}.schedules_of_leases, {schema}.fire_schedules,
    {schema}.abort_message, {schema}.report_running,
    {schema}.start_runs_with, {schema}.request_updates, {schema}.get_updates,
    {schema}.ask_run, {schema}.take_answers, {schema}.withdraw_query, {schema}.query_of_lease, {schema}.answer_queries,
    {schema}.start_activities, {schema}.beat_activities, {schema}.doomed_activities, {schema}.activity_of_lease,
    {schema}.expire_activities, {schema}.defer_activity, {schema}.park_activities, {schema}.finish_activities,
    {schema}.attempt_of_token, {schema}.beat_by_token, {schema}.pending_of,
    {schema}.change_escalation, {schema}.claim_escalation, {schema}.get_escalation, {schema}.list_escalations,
    {schema}.count_escalations, {schema}.resolve_escalation,
    {schema}.get_state, {schema}.read_output, {schema}.list_workflows, {schema}.count_workflows,
    {schema}.subscribe, {schema}.unsubscribe, {schema}.list_subscriptions, {schema}.finish_events, {schema}.look_again,
    {schema}.expire_runs, {schema}.reset_run, {schema}.list_children,
    {schema}.stream_counts, {schema}.stream_is_empty, {schema}.list_workers, {schema}.queue_counts, {schema}.read_gauges, {schema}.stream_rates
TO {worker};

-- {admin} cannot log in either, and is a member of {worker} (roles.sql).
GRANT EXECUTE ON FUNCTION
    {schema}.grant_login, {schema}.pause_stream, {schema}.peek_messages, {schema}.worker_messages, {schema}.count_waiting, {schema}.purge_messages,
    {schema}.list_dead_letters, {schema}.count_dead_letters, {schema}.redrive_dead_letters, {schema}.drop_dead_letters,
    {schema}.import_journal, {schema}.import_messages,
    {schema}.count_prunable, {schema}.prune_runs, {schema}.prune_dead_letters, {schema}.prune_expired,
    {schema}.flush_streams, {schema}.end_sessions,
    {schema}.add_worker, {schema}.worker_mark, {schema}.worker_logins, {schema}.add_worker_login, {schema}.disable_worker,
    {schema}.end_worker_sessions, {schema}.give_back_of_worker, {schema}.forget_worker_logins,
    {schema}.list_roles, {schema}.list_role_events, {schema}.find_stuck
TO {admin};
