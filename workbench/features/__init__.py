"""The feature store: extraction, index, queries, export, and features while recording."""
