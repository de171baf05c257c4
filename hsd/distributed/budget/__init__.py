"""`hsd budget`: what a step of a recipe needs in memory, traffic and time, before it is run."""
