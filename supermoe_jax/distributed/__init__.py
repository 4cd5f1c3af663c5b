"""The processes of a run on several hosts: how they join, show that they live, and are watched over."""
