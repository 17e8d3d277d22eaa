"""The pure scheduling core: events go in, actions come out (docs/architecture.md).

Nothing here does I/O, reads a clock, draws a random number or starts a thread (rule R1), so the simulator and the live
system run the same object.
"""
