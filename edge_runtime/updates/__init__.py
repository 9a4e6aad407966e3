"""Updates of the program on a board: two directories, of which a link names the one in use (A/B).

The draft bundle and all state stay where they are. An update that is not ready in time is undone, and so is one that a
power cut interrupts.
"""
