"""Figures: plotly built from values in memory. Nothing here knows of models or stores."""
