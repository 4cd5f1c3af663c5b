"""`supermoe inspect`: measures event files and proposes a config."""
