"""The processes of a run: how they find each other, agree on the run, and notice lost processes."""
