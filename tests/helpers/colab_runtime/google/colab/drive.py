"""Drive: links the folder COLAB_DRIVE to the mount point."""

import os
from pathlib import Path


def mount(mountpoint):
    my_drive = Path(mountpoint, "MyDrive")
    my_drive.parent.mkdir(exist_ok=True)
    if not my_drive.exists():
        my_drive.symlink_to(os.environ["COLAB_DRIVE"], target_is_directory=True)
    print(f"Mounted at {mountpoint}")
