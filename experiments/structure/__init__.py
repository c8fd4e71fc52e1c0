"""The structure of a source tree: rooms, arrows, circles, and the largest files, functions and signatures."""
