"""Builds the shards of a data set in many containers, in the volume that training reads.

modal run pipeline/materialize_modal.py [--dataset SRC] [--data-dir DIR] [--rows-per-shard N]
"""

import sys

from pupilseg.cloud.app import materializing_app

app, fetch, build, prepare, main = materializing_app(sys.argv[1:])
