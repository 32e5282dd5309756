"""Commands on an existing run (sample, evaluate, export, compare), and on names that experiments can use. Trains nothing."""
