"""Scorers in another process: the messages and the two ends (remote.py), and the same behind HTTP (http.py). Knows no Ray."""
