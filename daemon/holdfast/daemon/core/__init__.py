"""The daemon's brain: events in, actions out. No socket, clock, thread, random or logger."""
