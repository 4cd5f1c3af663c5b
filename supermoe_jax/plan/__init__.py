"""What a run would take on a pod, before there is one: compiled ahead of time, not guessed."""
