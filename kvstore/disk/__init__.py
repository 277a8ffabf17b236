"""Storage of values on devices: the log, its on-disk format, eviction and buffers."""
