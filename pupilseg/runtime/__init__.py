"""Devices, compilation, processes, threads, memory and progress bars."""
