"""The roles as Ray actors. The only folder that imports ray."""
