"""Launch commands and scripts, read without running anything of them."""
