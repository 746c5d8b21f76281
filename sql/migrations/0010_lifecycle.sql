-- The life of runs: who goes on where one closed, until when it may live, and who follows it without being its parent.

ALTER TABLE {schema}.run
    ADD COLUMN first_run_id uuid,              -- the first run of its chain; NULL: it is the first itself
    ADD COLUMN next_run_id uuid,               -- which run goes on where this one closed
    ADD COLUMN execution_deadline timestamptz; -- of the whole chain

-- A parent's children by the number of the command that started them, also where others have gone on for them.
CREATE INDEX run_by_parent ON {schema}.run (parent_run_id, parent_seq) WHERE parent_run_id IS NOT NULL;

-- Runs that wait for the end of another which they did not start: their child's id was taken, and they use that run.
CREATE TABLE {schema}.follower (
    follower_run_id uuid NOT NULL,
    seq int NOT NULL,
    run_id uuid NOT NULL,
    PRIMARY KEY (follower_run_id, seq)
);
CREATE INDEX follower_of ON {schema}.follower (run_id);
