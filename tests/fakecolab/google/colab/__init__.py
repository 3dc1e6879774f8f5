"""A stand-in for Colab's own package: the real signatures, and drills that the real one cannot be asked for.

`FAKECOLAB_MOUNT_POINT`  the folder that plays /content/drive
`FAKECOLAB_DRIVE`        ok | refused | timeout | enterprise | errno107:N | vanish:N | quota:BYTES
                         (N: file operations on the mounted Drive that still succeed)
"""

import os
from pathlib import Path

import smollm2.colab

smollm2.colab.MOUNT_POINT = Path(os.environ["FAKECOLAB_MOUNT_POINT"])
os.path.ismount = lambda folder: Path(f"{folder}.mounted").exists()  # a test machine mounts no file systems
