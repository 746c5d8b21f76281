-- What a worker holds: uuids cannot be compressed, and to try takes as long as to store them.
ALTER TABLE {schema}.worker ALTER COLUMN held SET STORAGE EXTERNAL;
