"""Stand-in for the package of Colab's runtime: the parts that the notebooks use, on disk."""
