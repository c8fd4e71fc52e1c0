"""Plotly figures made from values in memory: independent of models, stores and results."""
