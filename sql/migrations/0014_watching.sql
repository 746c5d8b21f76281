-- Watching a namespace: what each worker gets done, and which runs fail.

-- How many messages a second it has ended lately on each of its streams, in the order of stream_ids; NULL: none.
ALTER TABLE {schema}.worker ADD COLUMN rates real[] NOT NULL DEFAULT '{}';

-- Open runs whose last task failed.  Those that do not fail pay nothing: a step that leaves task_failure as it is (NULL)
-- changes no index, and stays a HOT update.
CREATE INDEX run_failing ON {schema}.run (started_at) WHERE status = 'running' AND task_failure IS NOT NULL;

-- Pages of a stream's dead letters, however many other streams have.
CREATE INDEX dead_letter_by_stream ON {schema}.dead_letter (stream_id, dead_letter_id);
