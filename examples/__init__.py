"""Scripts to start from. `step35-patch demo` runs `pretrain_step35.py`."""
