"""What two processes must agree on: ids, limits, messages, stripe map, placement, config, exit codes.

Pure: no socket, clock, file, thread or logger. Modules are imported by name; this front door re-exports nothing, so
that a process pays only for what it uses.
"""
