"""From a vision tower to a decoder: projectors and resamplers."""
