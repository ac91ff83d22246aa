"""Load a decoder, find its blocks and units, and walk it block by block."""
