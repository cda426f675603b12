"""The processes of a job: their rendezvous, their signs of life, and the comparison of their parameters."""
