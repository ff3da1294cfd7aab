"""Downloads: copied to the folder COLAB_DOWNLOADS, the user's own machine so to say."""

import os
import shutil


def download(filename):
    if not os.path.exists(filename):
        raise FileNotFoundError(f"Cannot find file: {filename}")
    shutil.copy(filename, os.environ["COLAB_DOWNLOADS"])
