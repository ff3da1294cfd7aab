"""Downloads: copies files to the folder COLAB_DOWNLOADS, which stands for the user's computer."""

import os
import shutil


def download(filename):
    if not os.path.exists(filename):
        raise FileNotFoundError(f"Cannot find file: {filename}")
    shutil.copy(filename, os.environ["COLAB_DOWNLOADS"])
