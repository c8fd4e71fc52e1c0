"""Studies made with the workbench."""
