"""What a plan costs on a cluster, before anything is trained."""
