"""Other libraries' signatures over headrace's ops, on CPU tensors of torch: replace an import, keep the program."""
