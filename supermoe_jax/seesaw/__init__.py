"""The seesaw study: what each task gains or loses in a shared model, over paired seeds."""
