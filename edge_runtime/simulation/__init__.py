"""The planner's proving ground: the same planners, modelled links, boards and verifiers, recorded acceptance."""
