"""One model family a file: what differs between SD3 and the next one. What they share is in generators/."""
