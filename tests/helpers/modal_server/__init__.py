"""A stand-in for Modal's servers on loopback; see README.md."""
