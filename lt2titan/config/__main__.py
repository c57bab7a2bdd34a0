"""Check a configuration before anything heavy starts: ``python -m lt2titan.config [--section.field value ...]``.

One process, no torch. Exits 0 when the run can start, 2 with one message when it cannot; ``--help`` documents
every field.
"""

from __future__ import annotations

import os
import sys

from lt2titan.config.loader import parse_arguments, to_toml, world_size_from_environment


def main() -> None:
    config = parse_arguments(sys.argv[1:], world_size_from_environment())
    if config.comm.mode != os.environ.get("COMM_MODE", config.comm.mode):  # run_train.sh has to know
        print("configuration error: comm.mode belongs on the command line or in COMM_MODE", file=sys.stderr)
        sys.exit(2)
    if config.job.print_config:
        print(to_toml(config))


if __name__ == "__main__":
    main()
