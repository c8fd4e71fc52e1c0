"""Sites of a model: the grammar that selects them, and the settings of a recording."""
