-- Counters of limiters and barriers.
--
-- Each call is a transaction of its own that waits, briefly, for others that change the same key: that is its purpose.

-- Internal: the space of the caller's keys: 0 for administrators, else the principal's number.
CREATE FUNCTION {schema}.space()
RETURNS int
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT CASE WHEN c.is_admin THEN 0 ELSE c.principal_id END FROM {schema}.caller() c);
END
$$;

-- Set a key that is not there (or has expired), for p_ttl milliseconds.  Answers whether it did.
CREATE FUNCTION {schema}.limiter_add(p_key text, p_value bigint, p_ttl bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
BEGIN
    IF starts_with(session_user, 'dd_') AND NOT EXISTS (SELECT 1 FROM {schema}.limiter l WHERE l.key = p_key AND l.space = {schema}.space()) THEN
        PERFORM {schema}.check_room('limiter', 1);
    END IF;
    INSERT INTO {schema}.limiter AS l (key, space, value, expires_at)
    VALUES (p_key, {schema}.space(), p_value, clock_timestamp() + least(p_ttl, 315360000000) * interval '1 millisecond')
    ON CONFLICT (key, space) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at
    WHERE l.expires_at <= clock_timestamp();
    RETURN FOUND;
END
$$;

-- Add p_amount to a key (0 where it is not there), unless that leaves the bounds; a NULL bound is none.  What is changed
-- lives p_ttl milliseconds from now.  Answers whether it was changed.
CREATE FUNCTION {schema}.limiter_change(p_key text, p_amount bigint, p_minimum bigint, p_maximum bigint, p_ttl bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_space int := {schema}.space();
    v_old bigint;
    v_new bigint;
BEGIN
    IF starts_with(session_user, 'dd_') AND NOT EXISTS (SELECT 1 FROM {schema}.limiter l WHERE l.key = p_key AND l.space = v_space) THEN
        PERFORM {schema}.check_room('limiter', 1);
    END IF;
    -- The row is there from now on, and locked.
    INSERT INTO {schema}.limiter AS l (key, space, value, expires_at) VALUES (p_key, v_space, 0, clock_timestamp())
    ON CONFLICT (key, space) DO UPDATE SET value = CASE WHEN l.expires_at > clock_timestamp() THEN l.value ELSE 0 END
    RETURNING l.value INTO v_old;
    v_new := v_old + p_amount;
    IF v_new < p_minimum OR v_new > p_maximum THEN
        RETURN false;
    END IF;
    UPDATE {schema}.limiter l
    SET value = v_new, expires_at = clock_timestamp() + least(p_ttl, 315360000000) * interval '1 millisecond'
    WHERE l.key = p_key AND l.space = v_space;
    RETURN true;
END
$$;

-- Add p_amount to a key unless it, or the sum of p_keys, would exceed p_maximum.  All who share p_anchor (the limiter
-- whose window p_keys are) do so one after the other: no two of them can look at the sum at once.
CREATE FUNCTION {schema}.limiter_change_sum(
    p_anchor text, p_key text, p_keys text[], p_amount bigint, p_maximum bigint, p_ttl bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
AS $$
DECLARE
    v_space int := {schema}.space();
    v_expiry timestamptz;
    v_total bigint;
BEGIN
    IF starts_with(session_user, 'dd_') AND NOT EXISTS (SELECT 1 FROM {schema}.limiter l WHERE l.key = p_anchor AND l.space = v_space) THEN
        PERFORM {schema}.check_room('limiter', 1);
    END IF;
    INSERT INTO {schema}.limiter AS l (key, space, value, expires_at) VALUES (p_anchor, v_space, 0, clock_timestamp())
    ON CONFLICT (key, space) DO UPDATE SET expires_at = excluded.expires_at;
    v_expiry := clock_timestamp() + least(p_ttl, 315360000000) * interval '1 millisecond';
    SELECT coalesce(sum(l.value), 0) INTO v_total FROM {schema}.limiter l
    WHERE l.key = ANY (p_keys) AND l.space = v_space AND l.expires_at > clock_timestamp();
    IF v_total + p_amount > p_maximum THEN
        RETURN false;
    END IF;
    RETURN {schema}.limiter_change(p_key, p_amount, NULL, p_maximum, p_ttl);
END
$$;
