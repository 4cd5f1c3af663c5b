"""The seesaw study: measures the gain or loss of each task in a shared model, over paired seeds."""
