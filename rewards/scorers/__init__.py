"""One reward a file, imported when an experiment names it, so that the libraries of the others are not needed.

A scorer is a final class named in rewards/names.py. What several scorers share is in rewards/parts/.
"""
