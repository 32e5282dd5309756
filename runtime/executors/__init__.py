"""Where the roles live: in this process, in Ray actors, or, for isolated rewards, in child processes. Knows no algorithm."""
