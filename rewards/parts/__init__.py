"""What several scorers share: facts, networks of CLIP's kind, files and hub ids, fixes for old packages. Imports no scorer."""
