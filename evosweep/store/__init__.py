"""The level store: every (unit, level) payload on disk, with a manifest that knows the rest."""
