"""Embedded toy worlds: a grammar of captions, a renderer, and prompt files. No networks; imports no other package of Odeon.

glyphs/   32x32 images of one or two coloured shapes and handwritten digits at named places
"""
