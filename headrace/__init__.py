"""Run open-weight language models at the speed the hardware allows."""
