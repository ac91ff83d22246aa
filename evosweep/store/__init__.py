"""The level store: the payload of every (unit, level) on disk, and a manifest of costs and measurements."""
