"""A reward in another process: messages and the two ends (remote.py), and the HTTP client (http.py). Knows no Ray."""
