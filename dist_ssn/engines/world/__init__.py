"""The processes of a job: how they meet, how each knows that the others live, and whether they still agree."""
