"""Runs what targets wrote: one file a runtime, one generation loop over all of them."""
