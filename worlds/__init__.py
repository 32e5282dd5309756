"""Embedded toy worlds: what can be said, what it looks like, and the prompt files. No networks; a leaf.

glyphs/   32x32 pictures of one or two coloured shapes and handwritten digits at named places
"""
