"""The machine: devices, compilation, processes, threads, memory and progress bars."""
