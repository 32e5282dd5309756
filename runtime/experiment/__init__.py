"""Experiments: the schema, the YAML that fills it, and the checks before anything heavy is loaded. Loads no network."""
