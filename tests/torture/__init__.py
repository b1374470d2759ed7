"""Torture tests: stock guests change files at random while others, which have just cached them, look at each change."""
