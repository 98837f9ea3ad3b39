"""A whole cluster in one thread, from one seed: real cores, real sessions, real bytes; clock, network and hands are fakes.

`scenario.run(seed)` plays one life of a cluster under faults and raises on the first broken promise, with the seed in
the text. Nothing here knows how the core decides; `checkers` keeps its own truth of what was staged and said.
"""
