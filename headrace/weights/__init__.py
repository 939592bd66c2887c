"""From a file on disk or the network to checked tensors in memory."""
