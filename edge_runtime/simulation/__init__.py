"""Simulation of the decoding loop: real planners, modelled links, boards and verifiers, recorded acceptance."""
