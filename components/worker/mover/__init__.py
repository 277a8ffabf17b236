"""The mover: the process that moves chunks between an engine's DRAM rows and the targets."""
