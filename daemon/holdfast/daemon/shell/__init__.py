"""The daemon's hands: sockets, memory, threads and the clock. Carries out what the core decides."""
