"""HOW things are computed fast: arrays in, arrays out; knows nothing of engines."""
