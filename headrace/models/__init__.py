"""Model families as data, and the decoder they share."""
