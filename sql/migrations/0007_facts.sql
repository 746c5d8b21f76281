-- What a run is started with beside its input: a schedule keeps all of it, not only the memo.

ALTER TABLE {schema}.schedule RENAME COLUMN memo TO facts;
