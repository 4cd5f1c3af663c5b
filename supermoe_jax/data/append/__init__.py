"""`supermoe append`: adds new events to a prepared dataset."""
