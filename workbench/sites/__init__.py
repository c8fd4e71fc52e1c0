"""The grammar of sites and the frozen settings of a recording."""
