"""The engine: requests, plans, the loop. Import its modules by name."""
