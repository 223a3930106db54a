"""`interp flow TEXT`: how much of each token reaches a position through attention."""
