"""Text decoders and encoders, and what they share."""
