-- The namespace's own roles.  Applied after the grants; repeatable.
--
-- Left out where the login that migrates may not create roles: {owner}, {worker} and {admin} are then that one login,
-- whose other functions are none of our business.
ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

-- An administrator's login is a member of {admin} alone, and may do what a worker may.
GRANT {worker} TO {admin};
