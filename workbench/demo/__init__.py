"""Everything on the embedded model."""
