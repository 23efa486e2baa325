"""Training data for the demonstration models: what it is made of, fetched, checked, cleaned and framed."""
