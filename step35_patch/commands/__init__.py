"""The commands of `step35-patch`, one module each; they load what they need when they run."""
