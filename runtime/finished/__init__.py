"""Commands on an existing run (sample, evaluate, export, compare), and on what experiments can name. Trains nothing."""
