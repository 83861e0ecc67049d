"""Who failed first: what ranks leave in the run directory as they fail, and what is made of it afterwards."""
