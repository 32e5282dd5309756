"""Where the roles run: in this process, in Ray actors, or, for isolated rewards, in child processes. Knows no algorithm."""
