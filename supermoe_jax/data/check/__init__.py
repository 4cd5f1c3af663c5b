"""`supermoe check`: derives labels of a sample again from the raw files, with independent code."""
