"""Experiments: their schema, reading it from YAML, and the checks before anything heavy is loaded. Loads no network."""
