"""`supermoe check`: derives a sample's labels again from the raw files, by code of its own."""
