"""The command line. One file a command; no logic of its own beyond wiring."""
